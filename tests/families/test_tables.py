"""Configurations and checkpoints of several versions, with unused tensors, and unsupported ones."""

from typing import Any

import pytest

from bam_ray.errors import FamilyError
from bam_ray.families import FAMILIES, Role, family_of
from bam_ray.families.family import HIDDEN_ACTS, ROPE_TYPES
from bam_ray.model import BamConfig, configuration_bam
from tests.support import tiny


def test_every_family_has_a_tiny_model() -> None:
    assert tiny.CONFIGS.keys() == FAMILIES.keys()


def test_the_mixture_supports_what_families_accept() -> None:
    assert set(HIDDEN_ACTS) == configuration_bam.ACTIVATIONS.keys()
    assert ROPE_TYPES == configuration_bam.ROPE_TYPES


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_roles_are_unique_within_a_layer(family: str) -> None:
    parameters = FAMILIES[family].parameters(tiny.CONFIGS[family].to_dict())
    assert len({(parameter.layer, parameter.role) for parameter in parameters}) == len(parameters)
    layers = [parameter.layer for parameter in parameters if parameter.layer is not None]
    assert layers == sorted(layers)
    assert set(layers) == {0, 1}


def test_both_layouts_of_rope_settings_are_equivalent() -> None:
    old = {**tiny.LLAMA_CONFIG, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {**tiny.LLAMA_CONFIG, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    converted = [family_of(raw, "seed").convert_config(raw)["rope_parameters"] for raw in (old, new)]
    assert converted[0].pop("type") == "linear"
    assert converted[0] == converted[1]
    pythia = {**tiny.LLAMA_CONFIG, "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 7.0}
    rope = BamConfig(**FAMILIES["gpt_neox"].convert_config(pythia)).rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}


def test_omitted_settings_have_the_defaults_of_transformers() -> None:
    mistral = {**tiny.LLAMA_CONFIG, "model_type": "mistral"}
    assert FAMILIES["mistral"].convert_config(mistral)["sliding_window"] == 4096
    cohere = FAMILIES["cohere"].convert_config({**tiny.LLAMA_CONFIG, "model_type": "cohere"})
    assert (cohere["tie_word_embeddings"], cohere["logit_scale"]) == (True, 0.0625)
    assert Role.HEAD not in {
        parameter.role for parameter in FAMILIES["cohere"].parameters({**tiny.LLAMA_CONFIG, "model_type": "cohere"})
    }


def test_fused_rows_are_disjoint_and_complete() -> None:
    raw = tiny.CONFIGS["gpt_neox"].to_dict()
    fused = [
        parameter
        for parameter in FAMILIES["gpt_neox"].parameters(raw)
        if parameter.name.endswith("0.attention.query_key_value.bias")
    ]
    assert [parameter.role for parameter in fused] == [Role.QUERY_BIAS, Role.KEY_BIAS, Role.VALUE_BIAS]
    ranges = sorted(rows for parameter in fused for rows in parameter.rows or [])
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == 3 * raw["hidden_size"]


def test_only_harmless_tensors_are_ignored() -> None:
    neox, llama = FAMILIES["gpt_neox"], FAMILIES["llama"]
    assert neox.ignores("gpt_neox.layers.11.attention.masked_bias")
    assert llama.ignores("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not llama.ignores("lm_head.weight")
    assert not llama.ignores("model.layers.0.self_attn.q_proj.bias")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2': supported are ['cohere', 'cohere2', 'gpt_neox'"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh', but only 'silu' or 'swish' or"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic', but only 'default' or"),
        ({"quantization_config": {"bits": 4}}, "seed is quantized (quantization_config in its config.json): load"),
        ({"model_type": "gpt_neox", "hidden_dropout": 0.1}, "hidden_dropout is 0.1, but only 0.0 is supported"),
        ({"num_attention_heads": 5}, "seed is not a valid llama configuration: "),
    ],
)
def test_unsupported_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(FamilyError) as caught:
        family_of({**tiny.LLAMA_CONFIG, **settings}, "seed")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
