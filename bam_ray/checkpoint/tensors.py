"""Reading the tensors of a Hugging Face folder from a blob store by byte range, whole or chunk by chunk.

Problem: a mixture is built from several models, each of which may be larger than memory, and they may be on S3.

Design choice: a safetensors file is an 8-byte length, a JSON header with the dtype, shape and byte range of every
tensor, and the bytes. `TensorReader` reads only the headers and then requests byte ranges, so peak memory is the
tensors or chunks in use, whatever the size of the model.

The ranks of a process group write a training checkpoint in parts. A part is a safetensors file whose tensors are flat,
and are ranges of elements of whole tensors. Its metadata says which. The reader puts the parts together:

    model.part-0002-of-0004.safetensors    "__metadata__": {"parts": "{<name>: [<first element>, <whole shape>]}"}

Limits: only safetensors files are read. The dtypes of quantized weights are refused; those of masks and other buffers
are read.
"""

import json
import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.digests import check_digests
from bam_ray.checkpoint.folder_reader import FolderReader
from bam_ray.checkpoint.model_folder import (
    INDEX,
    base_prefix,
    check_layers,
    is_part,
    read_config,
    refuse_pointer,
    refuse_wrappers,
    weight_files,
)
from bam_ray.checkpoint.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    METADATA,
    HeaderError,
    parse_header,
    parse_metadata,
)
from bam_ray.errors import BlobNotFound, CheckpointError

__all__ = ["CHUNK_BYTES", "DTYPES", "DTYPE_NAMES", "INDEX", "TensorLocation", "TensorReader", "TensorSpec"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
BUFFER_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
"""Further dtypes, of masks and other buffers in old checkpoints."""
READABLE = {**DTYPES, **BUFFER_DTYPES}
DTYPE_NAMES = {dtype: name for name, dtype in READABLE.items()}
PARTS = "parts"  # in the metadata of a part
CHUNK_BYTES = 2 << 20  # a few chunks in flight, and the freed ones that malloc keeps, make tens of MiB
REMOTE_CHUNK_BYTES = 4 << 20  # larger, because each chunk costs a round trip
REMOTE_REQUESTS = 2  # concurrent requests for one tensor of each source
MAX_POINTER_BYTES = 200  # of Git LFS
HEADS = ("lm_head.", "embed_out.")  # tensors outside of the base model

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


def encode_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the beginning of a safetensors file: the length of its header, and the header, padded to 8 bytes."""
    header: dict[str, Any] = {METADATA: metadata} if metadata else {}
    end = 0
    for spec in specs:
        start, end = end, end + spec.bytes
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


@dataclass(frozen=True)
class TensorRange:
    """Consecutive elements of a tensor, in the order of its rows.

    Attributes:
        spec: The whole tensor.
        first: The position of the first element.
        values: The elements, as a flat tensor.
    """

    spec: TensorSpec
    first: int
    values: Tensor


def encode_part_header(ranges: Sequence[TensorRange]) -> bytes:
    """Return the beginning of a safetensors file that holds `ranges`, at most one of each tensor."""
    flat = (TensorSpec(each.spec.name, each.spec.dtype, (each.values.numel(),)) for each in ranges)
    index = {each.spec.name: [each.first, each.spec.shape] for each in ranges}
    return encode_header(flat, {PARTS: json.dumps(index, separators=(",", ":"))})


@dataclass(frozen=True)
class TensorLocation:
    """The position of a tensor, or of a part of it, in the store.

    Attributes:
        key: The key of the file.
        start: The offset of the first byte in the file.
        first: The offset of the same byte in the whole tensor.
        length: The number of bytes.
    """

    key: str
    start: int
    first: int
    length: int


class TensorReader(FolderReader):
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
        super().__init__(store, prefix, has_manifest=files is None)
        self.config: dict[str, Any] = read_config(self) if files is None else {}
        self.specs: dict[str, TensorSpec] = {}
        self._locations: dict[str, list[TensorLocation]] = {}
        self.shards = tuple(weight_files(self, self.config) if files is None else files)
        for shard in self.shards:
            self._read_header(self._key(shard))
        self._check_parts()
        if files is None:
            refuse_wrappers(self.specs, self.uri)
            check_layers(self.config, self.specs, self.uri)
            self._add_prefix(base_prefix(self.config, self.specs))

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, in its stored dtype."""
        spec = self.specs[name]
        data = self._read_range(name, 0, spec.bytes)
        if not data:
            return torch.empty(spec.shape, dtype=spec.dtype)
        return torch.frombuffer(bytearray(data), dtype=spec.dtype).view(spec.shape)

    def read_together(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return tensors that lie next to each other in one file, with a single request for their whole range.

        They are views of one buffer on the CPU, in their stored dtypes.
        """
        locations = {name: self._locations[name][0] for name in names}
        first = min(names, key=lambda name: locations[name].start)
        key, start = locations[first].key, locations[first].start
        stop = max(location.start + location.length for location in locations.values())
        data = bytearray(self._read_blob(key, start, stop - start, first))
        found = {}
        for name in names:
            spec, offset = self.specs[name], locations[name].start - start
            assert locations[name].key == key, f"{name} is in another file than {first}"
            flat = torch.frombuffer(data, dtype=spec.dtype, count=spec.elements, offset=offset)
            found[name] = flat.view(spec.shape)
        return found

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

    def copy_range(self, name: str, first: int, target: Tensor) -> None:
        """Copy the elements of one tensor from `first` on to the flat `target`, which may have another dtype."""
        position = 0
        for chunk in self.chunks(name, first, first + target.numel()):
            target[position : position + chunk.numel()].copy_(chunk)
            position += chunk.numel()

    def check_digests(self) -> int:
        """Read every file that the manifest names and compare its digest.

        Returns:
            The number of files that were compared, 0 if there is no manifest.

        Raises:
            DigestMismatch: A file is missing or differs from the manifest.
        """
        if self._manifest is None:
            return 0
        check_digests(self.store, self._manifest, self._key, self.uri, "the file was changed or damaged")
        return len(self._manifest.files)

    def _read_range(self, name: str, start: int, length: int) -> bytes:
        """Read `length` bytes of a tensor from its byte `start` on, which may be in several files."""
        found = []
        for location in self._locations[name]:
            first = max(start, location.first)
            size = min(start + length, location.first + location.length) - first
            if size > 0:
                found.append(self._read_blob(location.key, location.start + first - location.first, size, name))
        return found[0] if len(found) == 1 else b"".join(found)

    def _read_blob(self, key: str, start: int, length: int, name: str) -> bytes:
        data = self.store.get_range(key, start, length)
        if len(data) != length:
            raise CheckpointError(_truncated(f"{self.store.uri}/{key}", name))
        return data

    def _read_header(self, key: str) -> None:
        """Add the tensors of one safetensors file to `specs` and `_locations`."""
        uri = f"{self.store.uri}/{key}"
        try:
            size = self.store.size(key)
            length = int.from_bytes(self.store.get_range(key, 0, LENGTH_BYTES), "little")
            if LENGTH_BYTES + length > size or length > MAX_HEADER_BYTES:
                refuse_pointer(self.store.get_range(key, 0, MAX_POINTER_BYTES), uri)
                raise HeaderError("is not a safetensors file, or it is truncated")
            data_start = LENGTH_BYTES + length
            header = self.store.get_range(key, LENGTH_BYTES, length)
            entries = parse_header(header, size - data_start)
            parts = _read_parts(header) if is_part(key) else {}
        except BlobNotFound:
            raise CheckpointError(f"{uri} is missing") from None
        except HeaderError as error:
            raise CheckpointError(f"{uri} {error}") from None
        for name, dtype, shape, start, stop in entries:
            if dtype not in READABLE:
                raise CheckpointError(
                    f"{uri}: tensor {name} has dtype {dtype}, so the model is quantized; supported are "
                    f"{', '.join(DTYPES)}: load it with transformers, call dequantize() and save it"
                )
            first, whole = parts.get(name, (0, shape))
            spec = self.specs[name] = TensorSpec(name, READABLE[dtype], whole)
            others = self._locations.get(name, []) if name in parts else []
            location = TensorLocation(key, data_start + start, first * spec.dtype.itemsize, stop - start)
            self._locations[name] = [*others, location]

    def _check_parts(self) -> None:
        """Raise `CheckpointError` if the parts of a tensor are not the whole tensor."""
        for name, locations in self._locations.items():
            locations.sort(key=lambda location: location.first)
            end = 0
            for location in locations:
                if location.first != end:
                    break
                end += location.length
            if end != self.specs[name].bytes:
                raise CheckpointError(f"{self.uri}: a part of tensor {name} is missing or damaged")

    def _add_prefix(self, prefix: str) -> None:
        """Rename all tensors except the head, as transformers does for checkpoints of the base model."""
        if prefix:
            names = {name: name if name.startswith(HEADS) else prefix + name for name in self.specs}
            self.specs = {
                names[name]: TensorSpec(names[name], spec.dtype, spec.shape) for name, spec in self.specs.items()
            }
            self._locations = {names[name]: location for name, location in self._locations.items()}


def _read_parts(header: bytes) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return the first element and the whole shape of the tensors of a part; raises `HeaderError`."""
    try:
        parts = json.loads(parse_metadata(header)[PARTS])
        return {name: (int(first), tuple(map(int, shape))) for name, (first, shape) in parts.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        raise HeaderError("is damaged: its header does not say which parts of the tensors it has") from None


def _truncated(uri: str, tensor: str) -> str:
    return f"{uri} is truncated: tensor {tensor} ends past its last byte"
