"""Tensors of Hugging Face folders, read one by one from a blob store by byte range and written shard by shard.

Peak memory is the tensors in hand, whatever the size of the model: a safetensors file is an 8-byte length, a JSON
header with every tensor's dtype, shape and byte range, and the bytes; so a header tells where to read, and, all
shapes being known before the first byte is written, a shard is written front to back.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_ray.blobs import BlobStore
from bam_ray.errors import BlobNotFound, CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorReader:
    """The tensors under `prefix` of a store that holds a Hugging Face folder. Headers are read at once, data never."""

    def __init__(self, store: BlobStore, prefix: str = "") -> None:
        self._store = store
        self._prefix = prefix
        self.config: dict[str, Any] = json.loads(self._file("config.json"))
        self.specs: dict[str, TensorSpec] = {}
        self._places: dict[str, tuple[str, int]] = {}  # name -> key, first byte
        self.shards: tuple[str, ...] = self._shards()  # names of the files that hold the tensors
        for shard in self.shards:
            self._read_header(self._key(shard))

    @property
    def uri(self) -> str:
        """Where the folder lies, for people."""
        return f"{self._store.uri}/{self._prefix}".rstrip("/")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in its own dtype."""
        spec = self.specs[name]
        key, start = self._places[name]
        data = self._store.get_range(key, start, spec.bytes)
        if len(data) != spec.bytes:
            raise CheckpointError(f"{self._store.uri}/{key} is cut short: tensor {name} ends past its last byte")
        if not data:
            return torch.empty(spec.shape, dtype=spec.dtype)
        return torch.frombuffer(bytearray(data), dtype=spec.dtype).view(spec.shape)

    def file(self, name: str) -> bytes | None:
        """Another file of the folder (a tokenizer's, say), or None."""
        try:
            return self._store.get(self._key(name))
        except BlobNotFound:
            return None

    def _file(self, name: str) -> bytes:
        data = self.file(name)
        if data is None:
            raise CheckpointError(f"{self.uri} is no Hugging Face model folder: it has no {name}")
        return data

    def _shards(self) -> tuple[str, ...]:
        index = self.file("model.safetensors.index.json")
        if index is None:
            return ("model.safetensors",)
        return tuple(sorted(set(json.loads(index)["weight_map"].values())))

    def _read_header(self, key: str) -> None:
        try:
            length = int.from_bytes(self._store.get_range(key, 0, 8), "little")
            header = json.loads(self._store.get_range(key, 8, length))
        except BlobNotFound:
            raise CheckpointError(f"{self._store.uri}/{key} is missing") from None
        except ValueError:
            raise CheckpointError(f"{self._store.uri}/{key} is no safetensors file, or cut short") from None
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(f"{self._store.uri}/{key}: tensor {name} is of dtype {entry['dtype']}")
            self.specs[name] = TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
            self._places[name] = (key, 8 + length + entry["data_offsets"][0])

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name


def write_tensors(
    folder: Path,
    specs: Iterable[TensorSpec],
    produce: Callable[[TensorSpec], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model*.safetensors` and, where there are several, their index; each tensor is produced when its turn
    comes and dropped when written."""
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + spec.bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, produce)
        weight_map.update({spec.name: name for spec in shard})
    if len(shards) > 1:
        total = sum(spec.bytes for shard in shards for spec in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_shard(path: Path, specs: list[TensorSpec], produce: Callable[[TensorSpec], Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            tensor = produce(spec)
            assert tensor.dtype == spec.dtype and tuple(tensor.shape) == spec.shape, spec
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
