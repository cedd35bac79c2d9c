"""A model folder written to a blob store while its tensors are being made: nothing is held but the chunks in hand.

    writer = ModelWriter(store, prefix)
    writer.tensors(specs, produce)             # model*.safetensors, one shard after the other
    writer.file("tokenizer.json", data)
    manifest = writer.commit(config, manifest) # config.json, then manifest.json: the mark that it is whole

All names, dtypes and shapes are known before the first byte, so headers go first and data follows front to back. One
thread makes and hashes chunks while another sends them.
"""

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from bam_ray.checkpoint.tensors import CHUNK_BYTES, DTYPE_NAMES, INDEX, TensorSpec
from bam_ray.errors import DigestMismatch

MAX_SHARD_BYTES = 4 << 30
AHEAD = 2  # chunks made but not sent yet

Produce = Callable[[TensorSpec], Iterator[Tensor]]
"""A tensor's values in order, as flat pieces; they are cast to its dtype."""


class ModelWriter:
    """Writes below `prefix`; the digests of all files are kept for the manifest."""

    def __init__(self, store: BlobStore, prefix: str = "", max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.store = store
        self.entries: dict[str, FileEntry] = {}
        self.prefix = prefix
        self._max_shard_bytes = max_shard_bytes

    def tensors(self, specs: Sequence[TensorSpec], produce: Produce, last: Sequence[TensorSpec] = ()) -> None:
        """Write all tensors. Those of `last` get a shard of their own: when `produce` is asked for the first of them,
        all `shards` of the others are in the store."""
        shards = [shard for shard in (*_split(specs, self._max_shard_bytes), list(last)) if shard]
        names = (
            ["model.safetensors"]
            if len(shards) == 1
            else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        )
        if len(shards) > 1:
            total = sum(spec.bytes for shard in shards for spec in shard)
            weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.file(INDEX, json.dumps(index, indent=2).encode())
        for name, shard in zip(names, shards, strict=True):
            self._shard(name, shard, produce)

    @property
    def shards(self) -> list[str]:
        """The weight files that are in the store."""
        return [name for name in self.entries if name.endswith(".safetensors")]

    def file(self, name: str, data: bytes) -> None:
        """Write another file."""
        self.store.put(self._key(name), data)
        self.entries[name] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    def copy(self, name: str, source: BlobStore, key: str, entry: FileEntry) -> None:
        """Write a file that lies at `key` of another store, chunk by chunk.

        Raises `DigestMismatch` where it is not what `entry` says.
        """
        digest = hashlib.sha256()

        def pieces() -> Iterator[bytes | memoryview]:
            for start in range(0, entry.size, CHUNK_BYTES):
                piece = source.get_range(key, start, min(CHUNK_BYTES, entry.size - start))
                digest.update(piece)
                yield piece
            if digest.hexdigest() != entry.sha256:
                raise DigestMismatch(f"{source.uri}/{key} is not what its manifest says: it was changed or damaged")

        self.store.put_stream(self._key(name), ahead(pieces()))
        self.entries[name] = entry

    def commit(self, config: str, manifest: Manifest) -> Manifest:
        """Write config.json, then the manifest with the digests of all files; returns the manifest.

        Raises `BlobExists` where another writer has committed here.
        """
        self.file("config.json", config.encode())
        whole = manifest.model_copy(update={"files": dict(sorted(self.entries.items()))})
        self.store.put_if_absent(self._key(MANIFEST), whole.to_bytes())
        return whole

    def _shard(self, name: str, specs: Sequence[TensorSpec], produce: Produce) -> None:
        digest = hashlib.sha256()
        size = 0

        def pieces() -> Iterator[bytes | memoryview]:
            nonlocal size
            for piece in _serialised(specs, produce):
                digest.update(piece)
                size += len(piece)
                yield piece

        self.store.put_stream(self._key(name), ahead(pieces()))
        self.entries[name] = FileEntry(size=size, sha256=digest.hexdigest())

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name


def _split(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.bytes
    return shards


def _serialised(specs: Sequence[TensorSpec], produce: Produce) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file."""
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
    yield len(text).to_bytes(8, "little") + text
    for spec in specs:
        written = 0
        for piece in produce(spec):
            data = piece.to(spec.dtype).contiguous().flatten().view(torch.uint8).numpy().data
            written += len(data)
            yield data
        assert written == spec.bytes, f"{spec.name}: {written} bytes made, {spec.bytes} announced"


def ahead(pieces: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same pieces, made by another thread a little before they are asked for.

    What making them raises is raised here. Where the taker goes away, the maker stops.
    """
    made: queue.Queue[bytes | memoryview | BaseException | None] = queue.Queue(maxsize=AHEAD)
    gone = threading.Event()

    def put(item: bytes | memoryview | BaseException | None) -> bool:
        while not gone.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for piece in pieces:
                if not put(piece):
                    return
        except BaseException as error:  # it is raised where the pieces are taken
            put(error)
        else:
            put(None)

    maker = threading.Thread(target=make, name="ahead", daemon=True)
    maker.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        gone.set()
        maker.join()
