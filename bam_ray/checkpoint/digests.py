"""The lengths and digests of files, local and in a blob store."""

import hashlib
from pathlib import Path

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import FileEntry

CHUNK_BYTES = 2 << 20


def file_entry(path: Path) -> FileEntry:
    """Compute the length and the SHA-256 digest of a file."""
    with path.open("rb") as file:
        return FileEntry(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def stored_entry(store: BlobStore, key: str) -> FileEntry:
    """Compute the length and the SHA-256 digest of a blob, in bounded memory; raises `BlobNotFound`."""
    digest, size = hashlib.sha256(), store.size(key)
    for start in range(0, size, CHUNK_BYTES):
        digest.update(store.get_range(key, start, min(CHUNK_BYTES, size - start)))
    return FileEntry(size=size, sha256=digest.hexdigest())
