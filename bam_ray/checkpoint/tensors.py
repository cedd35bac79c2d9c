"""Reading the tensors of a Hugging Face folder from a blob store by byte range, whole or chunk by chunk.

Problem: a mixture is built from several models, each of which may be larger than memory, and they may be on S3.

Design choice: a safetensors file is an 8-byte length, a JSON header with the dtype, shape and byte range of every
tensor, and the bytes. `TensorReader` reads only the headers and then requests byte ranges, so peak memory is the
tensors or chunks in use, whatever the size of the model.

Limits: five dtypes are supported (see `DTYPES`), and only safetensors files are read.
"""

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
from bam_ray.checkpoint.digests import stored_entry
from bam_ray.checkpoint.manifest import Manifest, read_manifest
from bam_ray.errors import BlobNotFound, CheckpointError, DigestMismatch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK_BYTES = 2 << 20  # a few chunks in flight, and the freed ones that malloc keeps, make tens of MiB
REMOTE_CHUNK_BYTES = 4 << 20  # larger, because each chunk costs a round trip
REMOTE_REQUESTS = 4  # concurrent requests for one tensor
INDEX = "model.safetensors.index.json"

# torch.frombuffer warns about read-only buffers; nothing writes to a chunk
warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)


@dataclass(frozen=True)
class TensorSpec:
    """The name, dtype and shape of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The size in bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class TensorLocation:
    """The position of a tensor in the store: the key of its file and the offset of its first byte in it."""

    key: str
    start: int


class TensorReader:
    """The tensors of a Hugging Face folder in a store; the constructor reads all headers and no data.

    Args:
        store: The store that holds the folder.
        prefix: The prefix of the folder in the store.
        files: The weight files to read, for a folder that is still being written and has no configuration yet. By
            default they are found in the folder, and `config` is its `config.json`.

    Raises:
        CheckpointError: This is not a Hugging Face folder, or a file is missing or shorter than its header says.
    """

    def __init__(self, store: BlobStore, prefix: str = "", files: Sequence[str] | None = None) -> None:
        self.store = store
        self.prefix = prefix
        self._manifest = read_manifest(store, prefix) if files is None else None
        self._folder = self._manifest.folder if self._manifest else ""
        try:
            self.config: dict[str, Any] = json.loads(self._required_file("config.json")) if files is None else {}
        except ValueError:
            raise CheckpointError(f"{self.uri}/config.json is not JSON: the file is damaged") from None
        self.specs: dict[str, TensorSpec] = {}
        self._locations: dict[str, TensorLocation] = {}
        self.shards = tuple(self._shard_names() if files is None else files)
        for shard in self.shards:
            self._read_header(self._key(shard))

    @property
    def uri(self) -> str:
        """The URI of the folder, for messages."""
        return f"{self.store.uri}/{self.prefix}".rstrip("/")

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, in its stored dtype."""
        spec = self.specs[name]
        data = self._read_range(name, 0, spec.bytes)
        if not data:
            return torch.empty(spec.shape, dtype=spec.dtype)
        return torch.frombuffer(bytearray(data), dtype=spec.dtype).view(spec.shape)

    def chunks(self, name: str, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """Yield one tensor, or its elements [first, last), as flat read-only chunks.

        On S3 up to `REMOTE_REQUESTS` chunks are requested at once.
        """
        spec = self.specs[name]
        size = spec.dtype.itemsize
        start, stop = first * size, (spec.elements if last is None else last) * size
        remote = self.store.uri.startswith("s3://")
        length = REMOTE_CHUNK_BYTES if remote else CHUNK_BYTES
        ranges = [(offset, min(length, stop - offset)) for offset in range(start, stop, length)]
        concurrent = remote and len(ranges) > 1
        sequential = (self._read_range(name, *each) for each in ranges)
        for data in self._read_concurrently(name, ranges) if concurrent else sequential:
            yield torch.frombuffer(data, dtype=spec.dtype)

    def _read_concurrently(self, name: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield ranges of a tensor in order, with at most `REMOTE_REQUESTS` requests in flight."""
        with ThreadPoolExecutor(max_workers=REMOTE_REQUESTS) as pool:
            in_flight: deque[Future[bytes]] = deque()
            for each in ranges:
                in_flight.append(pool.submit(self._read_range, name, *each))
                if len(in_flight) == REMOTE_REQUESTS:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()

    def read_file(self, name: str) -> bytes | None:
        """Return another file of the folder, for example a tokenizer's, or None if it does not exist."""
        try:
            return self.store.get(self._key(name))
        except BlobNotFound:
            return None

    def manifest(self) -> Manifest | None:
        """Return the manifest of the folder, or None if bam_ray did not write the folder."""
        return self._manifest

    def check_digests(self) -> int:
        """Read every file that the manifest names and compare its digest.

        Returns:
            The number of files that were compared, 0 if there is no manifest.

        Raises:
            DigestMismatch: A file differs from the manifest.
            CheckpointError: A file is missing.
        """
        manifest = self.manifest()
        for name, entry in manifest.files.items() if manifest else ():
            try:
                found = stored_entry(self.store, self._key(name))
            except BlobNotFound:
                raise CheckpointError(f"{self.uri}/{name} is missing, though its manifest names it") from None
            if found != entry:
                raise DigestMismatch(f"{self.uri}/{name} does not match its manifest: the file was changed or damaged")
        return len(manifest.files) if manifest else 0

    def _read_range(self, name: str, start: int, length: int) -> bytes:
        """Read `length` bytes of a tensor from its byte `start` on."""
        location = self._locations[name]
        data = self.store.get_range(location.key, location.start + start, length)
        if len(data) != length:
            raise CheckpointError(_truncated(f"{self.store.uri}/{location.key}", name))
        return data

    def _required_file(self, name: str) -> bytes:
        data = self.read_file(name)
        if data is None:
            raise CheckpointError(f"{self.uri} is not a Hugging Face model folder: it has no {name}")
        return data

    def _shard_names(self) -> list[str]:
        index = self.read_file(INDEX)
        if index is None:
            return ["model.safetensors"]
        try:
            return sorted(set(json.loads(index)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{self.uri}/{INDEX} is not an index of shards: the file is damaged") from None

    def _read_header(self, key: str) -> None:
        """Add the tensors of one safetensors file to `specs` and `_locations`."""
        uri = f"{self.store.uri}/{key}"
        try:
            size = self.store.size(key)
            length = int.from_bytes(self.store.get_range(key, 0, 8), "little")
            header = json.loads(self.store.get_range(key, 8, min(length, size)))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            for name, entry in entries.items():
                if entry["dtype"] not in DTYPES:
                    raise CheckpointError(
                        f"{uri}: tensor {name} has dtype {entry['dtype']}; supported are {', '.join(DTYPES)}"
                    )
                self.specs[name] = TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
                self._locations[name] = TensorLocation(key, 8 + length + entry["data_offsets"][0])
        except BlobNotFound:
            raise CheckpointError(f"{uri} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{uri} is not a safetensors file, or it is truncated") from None
        for name in entries:
            if self._locations[name].start + self.specs[name].bytes > size:
                raise CheckpointError(_truncated(uri, name))

    def _key(self, name: str) -> str:
        return "/".join(part for part in (self.prefix, self._folder, name) if part)


def _truncated(uri: str, tensor: str) -> str:
    return f"{uri} is truncated: tensor {tensor} ends past its last byte"
