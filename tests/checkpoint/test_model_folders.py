"""The weights that transformers would load are read, and other folders are refused by name."""

import json
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import BamError, CheckpointError

INDEX = "model.safetensors.index.json"
WEIGHTS = {"model.layers.0.mlp.up_proj.weight": torch.ones(2), "model.norm.weight": torch.zeros(2)}
CONFIG = {"model_type": "llama", "num_hidden_layers": 1}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4096\n"


def folder(weights: dict[str, Tensor] | None = None, **files: bytes | Any) -> MemoryStore:
    """Return a store with a configuration, `weights` and other files; `__` in a keyword stands for a dot."""
    store = MemoryStore()
    store.put("config.json", json.dumps(CONFIG).encode())
    if weights is not None:
        store.put("model.safetensors", save(weights))
    for name, content in files.items():
        store.put(name.replace("__", "."), content if isinstance(content, bytes) else json.dumps(content).encode())
    return store


def refusal(store: MemoryStore) -> str:
    with pytest.raises(CheckpointError) as caught:
        TensorReader(store)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_file_is_preferred_to_an_index() -> None:
    store = folder(WEIGHTS, old__safetensors=save({name: each + 5 for name, each in WEIGHTS.items()}))
    store.put(INDEX, json.dumps({"metadata": {}, "weight_map": dict.fromkeys(WEIGHTS, "old.safetensors")}).encode())
    assert torch.equal(TensorReader(store).read("model.norm.weight"), torch.zeros(2))
    store.delete("old.safetensors")
    assert TensorReader(store).shards == ("model.safetensors",)


def test_weights_that_the_configuration_names_are_refused() -> None:
    config = {**CONFIG, "transformers_weights": "other.safetensors"}
    assert "names its weights (transformers_weights is 'other.safetensors')" in refusal(
        folder(WEIGHTS, config__json=config)
    )


def test_a_base_model_gets_the_prefix_of_the_whole_one() -> None:
    weights = {
        "layers.0.mlp.up_proj.weight": torch.ones(2),
        "norm.weight": torch.ones(2),
        "lm_head.weight": torch.ones(2),
    }
    reader = TensorReader(folder(weights))
    assert set(reader.specs) == {"model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"}
    assert torch.equal(reader.read("model.norm.weight"), torch.ones(2))
    neox = TensorReader(folder(weights, config__json={**CONFIG, "model_type": "gpt_neox"}))
    assert "gpt_neox.layers.0.mlp.up_proj.weight" in neox.specs


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("_orig_mod.model.norm.weight", "prefix '_orig_mod' of torch.compile"),
        ("model.layers.0._orig_mod.mlp.up_proj.weight", "prefix '_orig_mod' of torch.compile"),
        ("module.model.norm.weight", "prefix 'module' of a parallel wrapper"),
        ("_fsdp_wrapped_module.model.norm.weight", "of FSDP"),
        ("base_model.model.model.norm.weight", "of PEFT"),
    ],
)
def test_a_prefix_of_a_wrapper_is_named(name: str, words: str) -> None:
    assert words in refusal(folder({**WEIGHTS, name: torch.ones(2)}))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"adapter_config__json": {}}, "is a PEFT adapter, not a whole model"),
        ({"pytorch_model__bin": b"PK"}, "PyTorch's .bin format, which can run code (pytorch_model.bin)"),
        ({"pytorch_model-00001-of-00002__bin": b"PK"}, "PyTorch's .bin format"),
        ({"model-q4__gguf": b"GGUF"}, "GGUF format of llama.cpp (model-q4.gguf)"),
        ({"model__safetensors__incomplete": b""}, "is a download that was interrupted"),
        ({"model-00001-of-00002__safetensors": b""}, f"has shards but no {INDEX}"),
        ({"model__fp16__safetensors": b""}, "has only a variant of its weights (model.fp16.safetensors)"),
        ({"consolidated__00__pth": b""}, "publisher's own format"),
        ({"tf_model__h5": b""}, "TensorFlow's format"),
        ({"zero_to_fp32__py": b""}, "is a checkpoint of DeepSpeed (zero_to_fp32.py)"),
        ({"README__md": b""}, "model.safetensors is missing: download or save"),
        ({"model__safetensors": POINTER}, "model.safetensors is a pointer of Git LFS"),
        ({"config__json": POINTER}, "config.json is a pointer of Git LFS"),
    ],
)
def test_a_folder_of_another_kind_is_named(files: dict[str, Any], words: str) -> None:
    assert words in refusal(folder(**files))


def test_a_tokenizer_that_is_a_pointer_is_refused() -> None:
    reader = TensorReader(folder(WEIGHTS, tokenizer__json=POINTER))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a pointer of Git LFS"):
        reader.read_file("tokenizer.json")


def test_masks_are_read_and_quantized_weights_refused() -> None:
    masks = {"a": torch.ones(2, dtype=torch.bool), "b": torch.ones(2, dtype=torch.uint8), "c": torch.ones(2).int()}
    reader = TensorReader(folder({**WEIGHTS, **masks}))
    assert all(torch.equal(reader.read(name), mask) for name, mask in masks.items())
    assert "x has dtype F8_E4M3, so the model is quantized" in refusal(
        folder({"x": torch.ones(2).to(torch.float8_e4m3fn)})
    )


def test_more_layers_than_tensors_are_refused_at_once() -> None:
    started = time.monotonic()
    for kind in ("llama", "qwen2", "cohere2", "bam"):
        config = {"model_type": kind, "num_hidden_layers": 200_000_000}
        assert "num_hidden_layers is 200000000, but the weights have 1 layers" in refusal(
            folder(WEIGHTS, config__json=config)
        )
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "config",
    [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe{", b"[" * 100_000, b'{"num_hidden_layers": ' + b"1" * 5000 + b"}"],
)
def test_a_configuration_that_is_no_object_is_refused(config: bytes) -> None:
    assert "config.json is not " in refusal(folder(WEIGHTS, config__json=config))


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[" * 100_000,
        *(json.dumps(each).encode() for each in ([], 7, {}, {"weight_map": []}, {"weight_map": {}})),
        *(
            json.dumps({"weight_map": {"x": shard}}).encode()
            for shard in (
                None,
                7,
                ["a"],
                {},
                "",
                "/etc/passwd",
                "../a.safetensors",
                "a/../../b",
                "a\0b",
                "a\nb",
                "\ud800",
            )
        ),
    ],
)
def test_an_index_that_is_damaged_is_refused(index: bytes) -> None:
    store = folder()
    store.put(INDEX, index)
    assert "the file is damaged" in refusal(store)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["model_type", "num_hidden_layers", "transformers_weights", "x"]), JSON),
    st.fixed_dictionaries({"weight_map": st.one_of(JSON, st.dictionaries(st.text(max_size=3), JSON, max_size=2))}),
)
def test_random_configurations_and_indices_are_one_line(config: dict[str, Any], index: dict[str, Any]) -> None:
    store = folder(config__json=config)
    store.put(INDEX, json.dumps(index).encode())
    assert refusal(store)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 600), st.booleans())
def test_changed_files_are_read_or_one_line(piece: bytes, place: int, cut: bool) -> None:
    data = save(WEIGHTS)
    store = folder(model__safetensors=data[:place] if cut else data[:place] + piece + data[place + len(piece) :])
    try:
        reader = TensorReader(store)
        tensors = [reader.read(name) for name in reader.specs]
    except BamError as error:
        assert "\n" not in str(error)  # noqa: PT017 (both outcomes are right)
    else:
        assert all(tensor.numel() >= 0 for tensor in tensors)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=64), JSON.map(lambda value: json.dumps(value).encode())))
def test_random_manifests_are_one_line(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="is not a manifest: "):
        Manifest.from_bytes(data, "folder")
    with pytest.raises(CheckpointError, match="is not a manifest: "):
        Manifest.from_bytes(b"[" * 100_000, "folder")
