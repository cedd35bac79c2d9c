"""Configurations and checkpoints as they lie on disks: of several versions, with leftovers, and unsupported ones."""

from typing import Any

import pytest

from bam_ray.errors import FamilyError
from bam_ray.families import FAMILIES, Role, family_of
from bam_ray.families.family import HIDDEN_ACTS, ROPE_TYPES
from bam_ray.model import BamConfig, configuration_bam
from tests.support import tiny

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 96,
}


def test_a_table_for_each_tiny_model() -> None:
    assert tiny.CONFIGS.keys() == FAMILIES.keys()


def test_what_families_allow_the_mixture_computes() -> None:
    assert set(HIDDEN_ACTS) == configuration_bam.ACTIVATIONS.keys()
    assert ROPE_TYPES == configuration_bam.ROPE_TYPES


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_roles_are_unique_within_a_layer(family: str) -> None:
    places = FAMILIES[family].places(tiny.CONFIGS[family].to_dict())
    assert len({(place.layer, place.role) for place in places}) == len(places)
    layers = [place.layer for place in places if place.layer is not None]
    assert layers == sorted(layers)
    assert set(layers) == {0, 1}


def test_both_layouts_of_rope_mean_the_same() -> None:
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    configured = [family_of(raw, "seed").configure(raw)["rope_parameters"] for raw in (old, new)]
    assert configured[0].pop("type") == "linear"
    assert configured[0] == configured[1]
    pythia = {**LLAMA, "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 7.0}
    rope = BamConfig(**FAMILIES["gpt_neox"].configure(pythia)).rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}


def test_defaults_that_a_file_leaves_out_are_transformers_defaults() -> None:
    mistral = {**LLAMA, "model_type": "mistral"}
    assert FAMILIES["mistral"].configure(mistral)["sliding_window"] == 4096
    cohere = FAMILIES["cohere"].configure({**LLAMA, "model_type": "cohere"})
    assert (cohere["tie_word_embeddings"], cohere["logit_scale"]) == (True, 0.0625)
    assert Role.HEAD not in {place.role for place in FAMILIES["cohere"].places({**LLAMA, "model_type": "cohere"})}


def test_fused_rows_are_disjoint_and_complete() -> None:
    raw = tiny.CONFIGS["gpt_neox"].to_dict()
    fused = [
        place for place in FAMILIES["gpt_neox"].places(raw) if place.name.endswith("0.attention.query_key_value.bias")
    ]
    assert [place.role for place in fused] == [Role.QUERY_BIAS, Role.KEY_BIAS, Role.VALUE_BIAS]
    ranges = sorted(rows for place in fused for rows in place.rows or [])
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == 3 * raw["hidden_size"]


def test_harmless_leftovers_are_ignored_and_others_are_not() -> None:
    neox, llama = FAMILIES["gpt_neox"], FAMILIES["llama"]
    assert neox.ignores("gpt_neox.layers.11.attention.masked_bias", tiny.CONFIGS["gpt_neox"].to_dict())
    assert llama.ignores("model.layers.0.self_attn.rotary_emb.inv_freq", LLAMA)
    assert llama.ignores("lm_head.weight", {**LLAMA, "tie_word_embeddings": True})
    assert not llama.ignores("lm_head.weight", LLAMA)
    assert not llama.ignores("model.layers.0.self_attn.q_proj.bias", LLAMA)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2': supported are ['cohere', 'cohere2', 'gpt_neox'"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh'; only 'silu' or 'swish' or"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; only 'default' or"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; only None is supported"),
        ({"model_type": "gpt_neox", "hidden_dropout": 0.1}, "hidden_dropout is 0.1; only 0.0 is supported"),
        ({"num_attention_heads": 5}, "seed is no llama configuration: "),
    ],
)
def test_what_is_not_supported_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(FamilyError) as caught:
        family_of({**LLAMA, **settings}, "seed")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
