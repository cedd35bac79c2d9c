"""The lengths and digests of files, local and in a blob store."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import FileEntry, Manifest
from bam_ray.errors import BlobNotFound, DigestMismatch

CHUNK_BYTES = 2 << 20


def file_entry(path: Path) -> FileEntry:
    """Compute the length and the SHA-256 digest of a file."""
    with path.open("rb") as file:
        return FileEntry(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def check_digests(store: BlobStore, manifest: Manifest, key_of: Callable[[str], str], uri: str, cause: str) -> None:
    """Read every file of a manifest from the store, in bounded memory.

    Args:
        store: The store that holds the files.
        manifest: The manifest.
        key_of: Returns the key of a file by its name in the manifest.
        uri: The URI of the files, for messages.
        cause: The probable cause of a difference, for messages.

    Raises:
        DigestMismatch: A file is missing or differs from what was committed.
    """
    for name, entry in manifest.files.items():
        try:
            found = stored_entry(store, key_of(name))
        except BlobNotFound:
            raise missing(uri, name, manifest) from None
        if found != entry:
            raise mismatch(uri, name, manifest, cause)


def missing(uri: str, name: str, manifest: Manifest) -> DigestMismatch:
    """Return the error for a file of a manifest that does not exist."""
    return DigestMismatch(f"{uri}/{name} is missing, though its manifest names it", manifest.id)


def mismatch(uri: str, name: str, manifest: Manifest, cause: str) -> DigestMismatch:
    """Return the error for a file that differs from its manifest."""
    return DigestMismatch(f"{uri}/{name} does not match its manifest: {cause}", manifest.id)


def stored_entry(store: BlobStore, key: str) -> FileEntry:
    """Compute the length and the SHA-256 digest of a blob, in bounded memory; raises `BlobNotFound`."""
    digest, size = hashlib.sha256(), store.size(key)
    for start in range(0, size, CHUNK_BYTES):
        digest.update(store.get_range(key, start, min(CHUNK_BYTES, size - start)))
    return FileEntry(size=size, sha256=digest.hexdigest())
