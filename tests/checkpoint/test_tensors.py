"""Tensors through a blob store: what is written shard by shard is read one by one, and is what safetensors reads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bam_ray.blobs.folder import FolderStore
from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.tensors import DTYPES, TensorReader, TensorSpec, write_tensors
from bam_ray.errors import CheckpointError

SHAPES: list[tuple[int, ...]] = [(3, 5), (), (0, 4), (7,), (2, 3, 4)]


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    named = {}
    for index, dtype in enumerate(DTYPES.values()):
        shape = SHAPES[index % len(SHAPES)]
        named[f"layer.{index}"] = (torch.randn(shape) * 10).to(dtype)
    return named


def written(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    (folder / "config.json").write_text('{"model_type": "bam"}')
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_tensors(folder, specs, lambda spec: tensors[spec.name], max_shard_bytes)


@pytest.mark.parametrize(("max_shard_bytes", "files"), [(1 << 20, 1), (128, 3), (1, 5)])
def test_written_tensors_are_read_back_bit_by_bit(tmp_path: Path, max_shard_bytes: int, files: int) -> None:
    tensors = some_tensors()
    written(tmp_path, tensors, max_shard_bytes)
    shards = sorted(tmp_path.glob("model*.safetensors"))
    assert len(shards) == files
    theirs = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    reader = TensorReader(FolderStore(tmp_path))
    assert reader.config == {"model_type": "bam"}
    assert set(reader.specs) == set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        assert reader.specs[name] == TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        assert torch.equal(reader.read(name), tensor)
        assert torch.equal(theirs[name], tensor)


def test_folders_that_safetensors_wrote_are_read(tmp_path: Path) -> None:
    tensors = some_tensors()
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "tokenizer.json").write_text("x")
    reader = TensorReader(FolderStore(tmp_path.parent), tmp_path.name)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    assert reader.file("tokenizer.json") == b"x"
    assert reader.file("missing.json") is None


def store_of(tmp_path: Path) -> MemoryStore:
    """A model of one shard in memory."""
    written(tmp_path, some_tensors(), 1 << 20)
    store = MemoryStore()
    for path in tmp_path.iterdir():
        store.put_file(path.name, path)
    return store


def test_what_is_no_model_folder_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no Hugging Face model folder: it has no config\.json"):
        TensorReader(MemoryStore())
    store = store_of(tmp_path)
    store.delete("model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        TensorReader(store)


@pytest.mark.parametrize("data", [b"", b"PK\3\4 a pickle is no safetensors file", b"\x10\0\0\0\0\0\0\0{"])
def test_a_file_that_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    store = store_of(tmp_path)
    store.put("model.safetensors", data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no safetensors file, or cut short"):
        TensorReader(store)


def test_a_cut_file_is_found_out_by_the_tensor_that_is_cut(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.put("model.safetensors", store.get("model.safetensors")[:-1])
    reader = TensorReader(store)
    reader.read("layer.0")
    with pytest.raises(CheckpointError, match=r"is cut short: tensor layer\.4 ends past its last byte"):
        reader.read("layer.4")


def test_a_dtype_that_is_not_known_is_named(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    store.put("model.safetensors", len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(CheckpointError, match="tensor x is of dtype F8_E4M3"):
        TensorReader(store)
