"""Weights of a dense checkpoint against its configuration: buffers, heads, shapes, dtypes and harmless differences."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CohereConfig, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from bam_ray.blobs import open_store
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import FamilyError
from bam_ray.families import FAMILIES, check_weights, family_of
from bam_ray.families.family import SIZE_SETTINGS
from bam_ray.families.weights import tensor_shapes
from bam_ray.upcycling import load_model
from tests.support import tiny

CONFIGS: dict[str, PreTrainedConfig] = {
    **tiny.CONFIGS,
    "llama, biases": LlamaConfig(**tiny.SIZES, attention_bias=True, mlp_bias=True),
    "cohere, q and k norms": CohereConfig(**tiny.SIZES, use_qk_norm=True, attention_bias=True),
    "gpt_neox, no attention bias": GPTNeoXConfig(**tiny.SIZES, attention_bias=False),
    "qwen3, biases": Qwen3Config(**tiny.SIZES, head_dim=16, attention_bias=True),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"

Change = Callable[[dict[str, Tensor]], object]


def changed(folder: Path, family: str, change: Change, **settings: Any) -> TensorReader:
    """Return a reader of a tiny model whose weights and configuration are changed."""
    tiny.dense(family, 0).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return TensorReader(open_store(str(folder)))


def check(reader: TensorReader) -> None:
    check_weights(reader, family_of(reader.config, reader.uri))


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    tiny.dense(CONFIGS[name], 0).save_pretrained(tmp_path)
    reader = TensorReader(open_store(str(tmp_path)))
    shapes = tensor_shapes(FAMILIES[reader.config["model_type"]], reader.config)
    assert shapes == {name: spec.shape for name, spec in reader.specs.items()}


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8])
def test_buffers_of_old_versions_are_passed_over(tmp_path: Path, kind: torch.dtype) -> None:
    def add(weights: dict[str, Tensor]) -> None:
        for layer in range(2):
            prefix = f"gpt_neox.layers.{layer}.attention."
            weights[prefix + "bias"] = torch.ones(1, 1, 64, 64).tril().to(kind)
            weights[prefix + "masked_bias"] = torch.tensor(-1e9)
            weights[prefix + "rotary_emb.inv_freq"] = torch.rand(4)

    reader = changed(tmp_path, "gpt_neox", add)
    check(reader)
    with torch.no_grad():
        expected = tiny.dense("gpt_neox", 0)(tiny.tokens()).logits
        torch.testing.assert_close(load_model(reader)(tiny.tokens()).logits, expected)


def test_a_second_copy_of_the_embedding_is_no_head(tmp_path: Path) -> None:
    check(changed(tmp_path, "qwen3", lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()})))


@pytest.mark.parametrize("row", [0, 95])
def test_a_tied_head_with_other_values_is_refused(tmp_path: Path, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_ray.families.weights.COMPARED_ELEMENTS", 100)

    def add(weights: dict[str, Tensor]) -> None:
        weights[HEAD] = weights[EMBEDDING].clone()
        weights[HEAD][row, -1] += 0.5

    with pytest.raises(FamilyError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, though"):
        check(changed(tmp_path, "qwen3", add))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop(HEAD), "lacks lm_head.weight: 1 tensors do not fit llama"),
        (lambda weights: weights.update({"score.weight": torch.ones(2)}), "has score.weight: 1 tensors do not fit"),
        (
            lambda weights: weights.update({UP: torch.empty(0)}),
            "has shape [0], but config.json describes [48, 32]: the ",
        ),
        (
            lambda weights: weights.update({UP: torch.ones(48, 31)}),
            "has shape [48, 31], but config.json describes [48, 32]",
        ),
        (lambda weights: weights.update({UP: torch.ones(48, 32).byte()}), "has dtype uint8, so the model is quantized"),
        (
            lambda weights: weights.update({UP + ".absmax": torch.ones(2)}),
            "is quantized (it has model.layers.1.mlp.up_proj",
        ),
        (
            lambda weights: weights.update({UP[:-6] + "qweight": torch.ones(2)}),
            "is quantized (it has model.layers.1.mlp.up",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: Change, words: str) -> None:
    reader = changed(tmp_path, "llama", change)
    with pytest.raises(FamilyError) as caught:
        check(reader)
    assert words in str(caught.value)


def test_sizes_that_the_weights_do_not_have_are_refused(tmp_path: Path) -> None:
    """No size of the configuration may cause a loop or an allocation of its own."""
    reader = changed(tmp_path, "gpt_neox", lambda weights: None)
    config, started = reader.config, time.monotonic()
    for key in set(SIZE_SETTINGS) & config.keys() - {"num_hidden_layers", "tie_word_embeddings"}:
        for size in (10**9, 2**40, 0, -1, 1.5, "8", [8], True, float("nan")):
            reader.config = {**config, key: size}
            with pytest.raises(FamilyError):
                check(reader)
    reader.config = {**config, "hidden_size": 10**9, "num_attention_heads": 10**9}
    with pytest.raises(FamilyError, match="has shape"):
        check(reader)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "change",
    [
        {"pad_token_id": 3},
        {"eos_token_id": [1, 2], "bos_token_id": None},
        {"unsloth_version": "2026.1.1", "_attn_implementation_autoset": True, "use_cache": False},
        {"attention_dropout": 0.1, "initializer_range": 0.02},
        {"max_position_embeddings": 8192},
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1},
        {"hidden_act": "swish", "head_dim": 8},
        {"rope_theta": 10000.0, "rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 1}, "x": 1} | {"rope_scaling": None},
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_differences_without_meaning_are_equal(family: str, change: dict[str, Any]) -> None:
    config = {**tiny.LLAMA_CONFIG, "model_type": family}
    assert FAMILIES[family].meaning(config) == FAMILIES[family].meaning({**config, **change})


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope_theta": 5e5}),
        ("llama", {"rms_norm_eps": 0.5}),
        ("llama", {"hidden_act": "relu"}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}),
        ("cohere", {"logit_scale": 2.0}),
    ],
)
def test_differences_with_meaning_are_seen(family: str, change: dict[str, Any]) -> None:
    config = {**tiny.LLAMA_CONFIG, "model_type": family}
    assert FAMILIES[family].meaning(config) != FAMILIES[family].meaning({**config, **change})


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
)
KEYS = (*SIZE_SETTINGS, "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_random_settings_are_accepted_or_one_line(family: str, change: dict[str, Any]) -> None:
    config = {**tiny.LLAMA_CONFIG, "model_type": family, **change}
    try:
        family_of(config, "seed")
    except FamilyError as error:
        assert "\n" not in str(error)  # noqa: PT017 (both outcomes are right)
    else:
        assert tensor_shapes(FAMILIES[family], config)
