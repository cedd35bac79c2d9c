"""Writing a model folder to a blob store while its tensors are computed, in memory bounded by a few chunks.

Problem: a mixture is larger than any of its models and often larger than memory.

Design choice: all names, dtypes and shapes are known before the first byte, so the header of each safetensors file is
written first and the data follows from front to back. One thread computes and hashes chunks while another sends them.

Limits: tensors are written once and in order; a failed file must be written again from its start.

Example:
    writer = ModelWriter(store, prefix)
    writer.write_tensors(specs, produce)        # model*.safetensors, one shard after the other
    writer.write_file("tokenizer.json", data)
    manifest = writer.commit(config, manifest)  # config.json, then manifest.json, which marks the folder as complete
"""

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from torch import Tensor

from bam_ray.blobs import BlobStore, put_once
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import Lease
from bam_ray.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from bam_ray.checkpoint.tensors import CHUNK_BYTES, INDEX, TensorSpec, encode_header
from bam_ray.errors import DigestMismatch, StoreUnavailable

MAX_SHARD_BYTES = 4 << 30
COMMIT_TRIES = 5
PREFETCHED_CHUNKS = 2  # chunks that are computed but not yet sent

Chunk = bytes | memoryview

ChunkProducer = Callable[[TensorSpec], Iterator[Tensor]]
"""A function that yields the values of a tensor in order as flat chunks, which the writer casts to its dtype."""


class ModelWriter:
    """A writer of one model folder, which records the digest of every file for the manifest.

    Args:
        store: The store to write to.
        prefix: The prefix of the folder in the store.
        max_shard_bytes: The size from which tensors are split over several safetensors files.
        commit_manifest: Commits the manifest; None writes it to the folder.
        prefetches: True if another thread computes chunks while one is sent. False for chunks that collectives make.
    """

    def __init__(
        self,
        store: BlobStore,
        prefix: str = "",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        commit_manifest: Callable[[Manifest], Manifest] | None = None,
        prefetches: bool = True,
    ) -> None:
        self.store = store
        self.entries: dict[str, FileEntry] = {}
        self.started: set[str] = set()  # the keys that were begun; their blobs may exist
        self.prefix = prefix
        self._max_shard_bytes = max_shard_bytes
        self._commit_manifest = commit_manifest or self._write_manifest
        self._prefetches = prefetches

    def write_tensors(
        self, specs: Sequence[TensorSpec], produce: ChunkProducer, last: Sequence[TensorSpec] = ()
    ) -> None:
        """Write all tensors and, if there are several shards, their index.

        Args:
            specs: The tensors, in the order of the files.
            produce: The function that computes the values of a tensor.
            last: Tensors that are written after all others, in a shard of their own. When `produce` is called for the
                first of them, all other `shards` are complete in the store and can be read.
        """
        shards = [shard for shard in (*_split_into_shards(specs, self._max_shard_bytes), list(last)) if shard]
        names = (
            ["model.safetensors"]
            if len(shards) == 1
            else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        )
        if len(shards) > 1:
            total = sum(spec.bytes for shard in shards for spec in shard)
            weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.write_file(INDEX, json.dumps(index, indent=2).encode())
        for name, shard in zip(names, shards, strict=True):
            self._write_shard(name, shard, produce)

    @property
    def shards(self) -> list[str]:
        """The safetensors files that are complete in the store."""
        return [name for name in self.entries if name.endswith(".safetensors")]

    def write_file(self, name: str, data: bytes) -> None:
        """Write another file of the folder."""
        self.store.put(self._key(name), data)
        self.entries[name] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    def copy_file(self, name: str, source: BlobStore, key: str, entry: FileEntry) -> None:
        """Copy the blob `key` of another store, chunk by chunk; raise `DigestMismatch` if it does not match `entry`."""
        digest = hashlib.sha256()

        def chunks() -> Iterator[Chunk]:
            for start in range(0, entry.size, CHUNK_BYTES):
                chunk = source.get_range(key, start, min(CHUNK_BYTES, entry.size - start))
                digest.update(chunk)
                yield chunk
            if digest.hexdigest() != entry.sha256:
                raise DigestMismatch(f"{source.uri}/{key} does not match its manifest: it was changed or damaged")

        self.store.put_stream(self._key(name), prefetch(chunks()), entry.size)
        self.entries[name] = entry

    def commit(self, config: str, manifest: Manifest) -> Manifest:
        """Write config.json, then the manifest with the digests of all files, and return the committed manifest.

        Raises:
            BlobExists: Another writer has committed in the same folder.
        """
        self.write_file("config.json", config.encode())
        return self._commit_manifest(manifest.model_copy(update={"files": dict(sorted(self.entries.items()))}))

    def _write_manifest(self, manifest: Manifest) -> Manifest:
        # If the answer is lost, the manifest may be there: a repeated put succeeds if it is ours
        for attempt in Retrying(
            retry=retry_if_exception_type(StoreUnavailable),
            wait=wait_random_exponential(multiplier=0.5, max=10.0),
            stop=stop_after_attempt(COMMIT_TRIES),
            reraise=True,
        ):
            with attempt:
                put_once(self.store, self._key(MANIFEST), manifest.to_bytes())
        return manifest

    def _write_shard(self, name: str, specs: Sequence[TensorSpec], produce: ChunkProducer) -> None:
        digest = hashlib.sha256()
        header = encode_header(specs, {"format": "pt"})
        size = len(header) + sum(spec.bytes for spec in specs)

        def chunks() -> Iterator[Chunk]:
            for chunk in chain([header], _serialize(specs, produce)):
                digest.update(chunk)
                yield chunk

        self.store.put_stream(self._key(name), prefetch(chunks()) if self._prefetches else chunks(), size)
        self.entries[name] = FileEntry(size=size, sha256=digest.hexdigest())

    def _key(self, name: str) -> str:
        key = f"{self.prefix}/{name}" if self.prefix else name
        self.started.add(key)
        return key


def artifact_writer(artifact: Artifact, lease: Lease | None) -> ModelWriter:
    """Return a writer of the files of an artifact, in a folder that no other attempt writes to."""
    folder = artifact.new_folder(lease)

    def commit(manifest: Manifest) -> Manifest:
        return artifact.commit(manifest.model_copy(update={"folder": folder}), lease)

    return ModelWriter(artifact.store, f"{artifact.prefix}/{folder}", commit_manifest=commit)


def _split_into_shards(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.bytes
    return shards


def _serialize(specs: Sequence[TensorSpec], produce: ChunkProducer) -> Iterator[Chunk]:
    """Yield the bytes of the tensors of a safetensors file."""
    for spec in specs:
        written = 0
        for chunk in produce(spec):
            data = chunk.to(spec.dtype).contiguous().flatten().view(torch.uint8).numpy().data
            written += len(data)
            yield data
        assert written == spec.bytes, f"{spec.name}: {written} bytes produced, {spec.bytes} announced"


def prefetch(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yield the same chunks, which another thread produces up to `PREFETCHED_CHUNKS` ahead.

    An exception of the producer is raised in the consumer. If the consumer stops, the producer stops too.
    """
    produced: queue.Queue[Chunk | BaseException | None] = queue.Queue(maxsize=PREFETCHED_CHUNKS)
    cancelled = threading.Event()
    producer = threading.Thread(target=_produce, args=(chunks, produced, cancelled), name="prefetch", daemon=True)
    producer.start()
    try:
        while (item := produced.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        cancelled.set()
        producer.join()


def _produce(
    chunks: Iterator[Chunk], produced: "queue.Queue[Chunk | BaseException | None]", cancelled: threading.Event
) -> None:
    """Put all chunks into the queue, then None, or the exception that `chunks` raises."""

    def put(item: Chunk | BaseException | None) -> bool:
        while not cancelled.is_set():
            try:
                produced.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for chunk in chunks:
            if not put(chunk):
                return
    except BaseException as error:  # raised again in the thread of the consumer
        put(error)
    else:
        put(None)
