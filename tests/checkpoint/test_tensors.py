"""Tensors that are written to a blob store are read back unchanged, by this package and by safetensors."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bam_ray.blobs.folder import FolderStore
from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.model_folder import part_name
from bam_ray.checkpoint.tensors import (
    DTYPES,
    TensorReader,
    TensorSpec,
    encode_header,
    encode_part_header,
)
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import CheckpointError, DigestMismatch
from tests.support.state_parts import ranges_of

SHAPES: list[tuple[int, ...]] = [(3, 5), (), (0, 4), (7,), (2, 3, 4)]


def example_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    named = {}
    for index, dtype in enumerate(DTYPES.values()):
        shape = SHAPES[index % len(SHAPES)]
        named[f"layer.{index}"] = (torch.randn(shape) * 10).to(dtype)
    return named


def write_model(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = ModelWriter(FolderStore(folder), max_shard_bytes=max_shard_bytes)
    writer.write_tensors(specs, lambda spec: iter(tensors[spec.name].flatten().split(5)))
    writer.commit('{"model_type": "bam"}', Manifest(id="m", kind="seeds", name="m"))


@pytest.mark.parametrize(("max_shard_bytes", "files"), [(1 << 20, 1), (128, 4), (1, 6)])
def test_written_tensors_are_read_back_bit_by_bit(tmp_path: Path, max_shard_bytes: int, files: int) -> None:
    tensors = example_tensors()
    write_model(tmp_path, tensors, max_shard_bytes)
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


def test_folders_written_by_safetensors_are_read(tmp_path: Path) -> None:
    tensors = example_tensors()
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "tokenizer.json").write_text("x")
    reader = TensorReader(FolderStore(tmp_path.parent), tmp_path.name)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    assert reader.read_file("tokenizer.json") == b"x"
    assert reader.read_file("missing.json") is None


def memory_model(tmp_path: Path) -> MemoryStore:
    """Return a store in memory with a model of one shard."""
    write_model(tmp_path, example_tensors(), 1 << 20)
    store = MemoryStore()
    for path in tmp_path.iterdir():
        store.put_file(path.name, path)
    return store


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a Hugging Face model folder: it has no config\.json"):
        TensorReader(MemoryStore())
    store = memory_model(tmp_path)
    store.delete("model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        TensorReader(store)


@pytest.mark.parametrize("data", [b"", b"PK\3\4 a pickle is not a safetensors file", b"\x10\0\0\0\0\0\0\0{"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, data: bytes) -> None:
    store = memory_model(tmp_path)
    store.put("model.safetensors", data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file, or it is truncated"):
        TensorReader(store)


def test_a_truncated_file_is_detected_by_its_header(tmp_path: Path) -> None:
    store = memory_model(tmp_path)
    store.put("model.safetensors", store.get("model.safetensors")[:-1])
    with pytest.raises(CheckpointError, match=r"is truncated: tensor layer\.5 ends past its last byte"):
        TensorReader(store)


def test_a_changed_file_is_detected_by_its_digest(tmp_path: Path) -> None:
    store = memory_model(tmp_path)
    assert TensorReader(store).check_digests() == 2
    data = bytearray(store.get("model.safetensors"))
    data[-1] ^= 1
    store.put("model.safetensors", bytes(data))
    with pytest.raises(DigestMismatch, match=r"model\.safetensors does not match its manifest"):
        TensorReader(store).check_digests()


def test_an_exception_of_the_producer_reaches_the_caller(tmp_path: Path) -> None:
    store = MemoryStore()

    def produce(spec: TensorSpec) -> Iterator[Tensor]:
        yield torch.zeros(2)
        raise InterruptedError(spec.name)

    with pytest.raises(InterruptedError, match="layer"):
        ModelWriter(store).write_tensors([TensorSpec("layer", torch.float32, (4,))], produce)
    assert list(store.list()) == []


def test_the_last_shard_is_computed_when_the_others_are_readable() -> None:
    store = MemoryStore()
    writer = ModelWriter(store)
    first, last = (TensorSpec(name, torch.float32, (3,)) for name in ("first", "last"))

    def produce(spec: TensorSpec) -> Iterator[Tensor]:
        if spec is last:
            yield TensorReader(store, files=writer.shards).read("first") + 1
        else:
            yield torch.ones(3)

    writer.write_tensors([first], produce, last=[last])
    writer.commit("{}", Manifest(id="m", kind="seeds", name="m"))
    assert torch.equal(TensorReader(store).read("last"), torch.full((3,), 2.0))


def test_a_range_of_a_tensor_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_ray.checkpoint.tensors.CHUNK_BYTES", 16)
    tensor = torch.arange(30.0).view(10, 3)
    write_model(tmp_path, {"x": tensor}, 1 << 20)
    reader = TensorReader(FolderStore(tmp_path))
    chunks = list(reader.chunks("x"))
    assert max(chunk.numel() for chunk in chunks) == 4
    assert torch.equal(torch.cat(chunks), tensor.flatten())
    assert torch.equal(torch.cat(list(reader.chunks("x", 6, 15))), torch.arange(6.0, 15.0))


def write_parts(folder: Path, tensors: dict[str, Tensor], parts: int) -> None:
    """Write a folder whose tensors are divided into `parts` files."""
    (folder / "config.json").write_text("{}")
    for part in range(parts):
        ranges = ranges_of(tensors, part, parts)
        data = b"".join(each.values.view(torch.uint8).numpy().tobytes() for each in ranges)
        (folder / part_name("model", part, parts)).write_bytes(encode_part_header(ranges) + data)


@pytest.mark.parametrize("parts", [1, 2, 5, 12])
def test_parts_are_put_together(parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_ray.checkpoint.tensors.CHUNK_BYTES", 16)
    tensors = {name: tensor for name, tensor in example_tensors().items() if tensor.numel()}
    write_parts(tmp_path, tensors, parts)
    reader = TensorReader(FolderStore(tmp_path))
    assert len(reader.shards) == parts
    assert {*reader.specs} == {*tensors}
    for name, tensor in tensors.items():
        assert reader.specs[name] == TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        assert torch.equal(reader.read(name), tensor)
        flat = tensor.flatten()
        for first in range(len(flat)):
            found = torch.empty(len(flat) - first, dtype=flat.dtype)
            reader.copy_range(name, first, found)
            assert torch.equal(found, flat[first:])


def test_other_libraries_read_parts(tmp_path: Path) -> None:
    write_parts(tmp_path, {"x": torch.arange(6.0).view(2, 3)}, 2)
    assert load_file(tmp_path / part_name("model", 1, 2))["x"].tolist() == [3.0, 4.0, 5.0]


def test_a_missing_part_is_noticed(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(30.0).view(10, 3)}
    for missing in range(3):
        write_parts(tmp_path, tensors, 3)
        (tmp_path / part_name("model", missing, 3)).unlink()
        with pytest.raises(CheckpointError, match="a part of tensor x is missing or damaged"):
            TensorReader(FolderStore(tmp_path))


@pytest.mark.parametrize("metadata", [None, {"parts": "no JSON"}, {"parts": '{"x": 1}'}, {"parts": "[]"}])
def test_a_part_without_an_index_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    header = encode_header([TensorSpec("x", torch.float32, (1,))], metadata)
    (tmp_path / part_name("model", 0, 1)).write_bytes(header + b"\0" * 4)
    with pytest.raises(CheckpointError, match="its header does not say which parts of the tensors it has"):
        TensorReader(FolderStore(tmp_path))


def test_concurrent_requests_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_ray.checkpoint.tensors.REMOTE_CHUNK_BYTES", 16)
    tensor = torch.arange(100.0)
    write_model(tmp_path, {"x": tensor}, 1 << 20)

    class SlowStore(FolderStore):
        """A remote store whose earlier requests take longer than later ones."""

        uri = "s3://far/away"

        def get_range(self, key: str, start: int, length: int) -> bytes:
            time.sleep(0.02 / (1 + start % 64))
            return super().get_range(key, start, length)

    chunks = list(TensorReader(SlowStore(tmp_path)).chunks("x"))
    assert len(chunks) == 25
    assert torch.equal(torch.cat(chunks), tensor)


def test_an_unsupported_dtype_is_named(tmp_path: Path) -> None:
    store = memory_model(tmp_path)
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    store.put("model.safetensors", len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(
        CheckpointError, match="tensor x has dtype F8_E4M3, so the model is quantized; supported are F64"
    ):
        TensorReader(store)
