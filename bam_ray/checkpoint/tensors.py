"""Tensors of Hugging Face folders, read from a blob store by byte range, whole or chunk by chunk.

A safetensors file is an 8-byte length, a JSON header with every tensor's dtype, shape and byte range, and the bytes;
so the header tells where to read, and peak memory is the tensors or chunks in hand, whatever the size of the model.
"""

import hashlib
import json
import math
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from bam_ray.errors import BlobNotFound, CheckpointError, DigestMismatch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK_BYTES = 2 << 20  # a few are in flight at once, and what C's allocator keeps of those before: tens of MiB
REMOTE_CHUNK_BYTES = 4 << 20  # each costs a round trip
REMOTE_AHEAD = 4  # requests under way at once, for one tensor
INDEX = "model.safetensors.index.json"

# Bytes from a store cannot be written to, and nothing here writes to a chunk
warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Extent:
    """Where a tensor lies: the key of its file, and its first byte there."""

    key: str
    start: int


class TensorReader:
    """The tensors under `prefix` of a store that holds a Hugging Face folder. Headers are read at once, data never.

    Raises `CheckpointError` where it is none, or where a file is missing or shorter than its header says.
    """

    def __init__(self, store: BlobStore, prefix: str = "", files: Sequence[str] | None = None) -> None:
        """`files` names the weight files of a folder that is still being written, which has no configuration yet."""
        self.store = store
        self._prefix = prefix
        try:
            self.config: dict[str, Any] = json.loads(self._file("config.json")) if files is None else {}
        except ValueError:
            raise CheckpointError(f"{self.uri}/config.json is not JSON: the file is damaged") from None
        self.specs: dict[str, TensorSpec] = {}
        self._extents: dict[str, Extent] = {}
        self.shards = tuple(self._index() if files is None else files)  # the files that hold the tensors
        for shard in self.shards:
            self._read_header(self._key(shard))

    @property
    def uri(self) -> str:
        """Where the folder lies, for people."""
        return f"{self.store.uri}/{self._prefix}".rstrip("/")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in its own dtype."""
        spec = self.specs[name]
        data = self._range(name, 0, spec.bytes)
        if not data:
            return torch.empty(spec.shape, dtype=spec.dtype)
        return torch.frombuffer(bytearray(data), dtype=spec.dtype).view(spec.shape)

    def chunks(self, name: str, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """One tensor (or its elements [first, last)), flat, in pieces that cannot be written to."""
        spec = self.specs[name]
        size = spec.dtype.itemsize
        start, stop = first * size, (spec.elements if last is None else last) * size
        remote = self.store.uri.startswith("s3://")
        length = REMOTE_CHUNK_BYTES if remote else CHUNK_BYTES
        ranges = [(at, min(length, stop - at)) for at in range(start, stop, length)]
        fetched = (self._range(name, *each) for each in ranges)
        for data in self._side_by_side(name, ranges) if remote and len(ranges) > 1 else fetched:
            yield torch.frombuffer(data, dtype=spec.dtype)

    def _side_by_side(self, name: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Ranges of a tensor in order, `REMOTE_AHEAD` requests under way at once."""
        with ThreadPoolExecutor(max_workers=REMOTE_AHEAD) as pool:
            waiting: deque[Future[bytes]] = deque()
            for each in ranges:
                waiting.append(pool.submit(self._range, name, *each))
                if len(waiting) == REMOTE_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def file(self, name: str) -> bytes | None:
        """Another file of the folder (a tokenizer's, say), or None."""
        try:
            return self.store.get(self._key(name))
        except BlobNotFound:
            return None

    def manifest(self) -> Manifest | None:
        """What the folder says of itself, or None where it came from elsewhere."""
        data = self.file(MANIFEST)
        return None if data is None else Manifest.from_bytes(data, self.uri)

    def check_digests(self) -> int:
        """Read every file that the manifest names and compare; returns how many (0 without a manifest).

        Raises `DigestMismatch`, or `CheckpointError` for a file that is missing.
        """
        manifest = self.manifest()
        for name, entry in manifest.files.items() if manifest else ():
            if self._entry(name) != entry:
                raise DigestMismatch(
                    f"{self.uri}/{name} is not what its manifest says: the file was changed or damaged"
                )
        return len(manifest.files) if manifest else 0

    def _entry(self, name: str) -> FileEntry:
        key, digest = self._key(name), hashlib.sha256()
        try:
            size = self.store.size(key)
        except BlobNotFound:
            raise CheckpointError(f"{self.uri}/{name} is missing, though its manifest names it") from None
        for start in range(0, size, CHUNK_BYTES):
            digest.update(self.store.get_range(key, start, min(CHUNK_BYTES, size - start)))
        return FileEntry(size=size, sha256=digest.hexdigest())

    def _range(self, name: str, start: int, length: int) -> bytes:
        extent = self._extents[name]
        data = self.store.get_range(extent.key, extent.start + start, length)
        if len(data) != length:
            raise CheckpointError(f"{self.store.uri}/{extent.key} is cut short: tensor {name} ends past its last byte")
        return data

    def _file(self, name: str) -> bytes:
        data = self.file(name)
        if data is None:
            raise CheckpointError(f"{self.uri} is no Hugging Face model folder: it has no {name}")
        return data

    def _index(self) -> list[str]:
        index = self.file(INDEX)
        if index is None:
            return ["model.safetensors"]
        try:
            return sorted(set(json.loads(index)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{self.uri}/{INDEX} is no index of shards: the file is damaged") from None

    def _read_header(self, key: str) -> None:
        where = f"{self.store.uri}/{key}"
        try:
            size = self.store.size(key)
            length = int.from_bytes(self.store.get_range(key, 0, 8), "little")
            header = json.loads(self.store.get_range(key, 8, min(length, size)))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            for name, entry in entries.items():
                if entry["dtype"] not in DTYPES:
                    raise CheckpointError(
                        f"{where}: tensor {name} is of dtype {entry['dtype']}, which is not supported"
                    )
                self.specs[name] = TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
                self._extents[name] = Extent(key, 8 + length + entry["data_offsets"][0])
        except BlobNotFound:
            raise CheckpointError(f"{where} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{where} is no safetensors file, or cut short") from None
        for name in entries:
            if self._extents[name].start + self.specs[name].bytes > size:
                raise CheckpointError(f"{where} is cut short: tensor {name} ends past its last byte")

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name
