"""The blob store: bytes by key, and the interface that every storage backend implements.

Problem: all durable data of a run (corpora, checkpoints, models, reports) must outlive any node, and several writers
may race for the same key, for example a task that was restarted while its first process still runs on a node that
lost its network. Runs must work on one machine with a folder and on a cluster with S3.

Design choice: the interface has only the operations that a POSIX folder and an S3 bucket can both provide. Two
guarantees carry everything else:

- A put is all or nothing. A reader sees the old bytes, the new bytes or no blob, and never a part of a blob.
- `put_if_absent` is atomic. If several writers race for a key, exactly one succeeds. Commits and leases rest on it.

Limits: there are no renames, no appends and no transactions over several keys. Some S3 servers have no conditional
puts; `bam_ray.blobs.check` detects them, and a `Promise` of "weak" accepts them.

Keys are relative and `/`-separated. They have no empty, `.` or `..` parts.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol

from bam_ray.errors import BlobExists, BlobNotFound, StoreError

Promise = Literal["strict", "weak"]
"""The guarantee that is asked of `put_if_absent` (the setting `store.promise`).

"strict" is an atomic put. "weak" is a check for the key followed by a put, so two writers at the same moment may both
believe that they won.
"""


class BlobStore(Protocol):
    """Bytes by key, in a folder, an S3 bucket or memory.

    Every method raises `StoreDenied` or `StoreUnavailable` if the store itself fails.
    """

    @property
    def uri(self) -> str:
        """The URI of this store, as given to `open_store`, without a trailing slash."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write `data` to `key` and replace any previous bytes."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write `data` to `key`; raise `BlobExists` if another put has written the key.

        A call succeeds if its answer was lost and the put was repeated, because the store recognizes its own write. A
        call that raises `StoreUnavailable` may have written the blob; `put_once` can be called again after that.
        """
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Upload a file of any size (to S3 in several parts if it is large)."""
        ...

    def put_stream(self, key: str, chunks: Iterator[bytes | memoryview], size: int | None = None) -> None:
        """Write a stream to `key` in bounded memory and replace any previous bytes.

        If `chunks` raises, its exception propagates unchanged and no part of the blob becomes visible. A chunk is
        copied before the next one is requested, so the producer may reuse its buffer.

        Args:
            key: The key of the blob.
            chunks: The bytes of the blob.
            size: The number of bytes, if it is known. S3 accepts at most 78 GiB of a stream of unknown size.
        """
        ...

    def get(self, key: str) -> bytes:
        """Return all bytes of `key`; raise `BlobNotFound` if it does not exist."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return bytes [start, start + length) of `key`; raise `BlobNotFound` if it does not exist.

        The result is shorter if the blob ends before `start + length`.
        """
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Download `key` to `path`, whose folder must exist; raise `BlobNotFound` if the key does not exist."""
        ...

    def size(self, key: str) -> int:
        """Return the length of `key` in bytes; raise `BlobNotFound` if it does not exist."""
        ...

    def exists(self, key: str) -> bool:
        """Return True if `key` exists."""
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield all keys that begin with `prefix`, in the order of their bytes."""
        ...

    def delete(self, key: str) -> None:
        """Remove `key`; do nothing if it does not exist."""
        ...

    def abort_uploads(self, prefix: str, older_than: timedelta) -> Sequence[str]:
        """Remove what killed writers left below `prefix`: unfinished uploads, which appear in no list but use space.

        Args:
            prefix: The prefix of the keys.
            older_than: The least age. An upload that is still in progress must be younger.

        Returns:
            The keys of the uploads on S3; the names of the temporary files in a folder.
        """
        ...


def put_once(store: BlobStore, key: str, data: bytes) -> None:
    """Write `data` to `key` like `put_if_absent`, but also succeed if the key holds exactly `data` already.

    A call whose outcome is unknown, because its answer was lost, can therefore be repeated. If two writers must not
    both succeed, their `data` must differ, for example by a random value.

    Raises:
        BlobExists: The key holds other bytes.
    """
    try:
        store.put_if_absent(key, data)
    except BlobExists:
        try:
            if store.get(key) == data:
                return
        except BlobNotFound:  # it was deleted in the meantime
            pass
        raise


def sort_keys(keys: Iterable[str]) -> Sequence[str]:
    """Return `keys` in the order of their bytes, which is the order of AWS."""
    return sorted(keys, key=lambda key: key.encode("utf-8", "surrogateescape"))


def validate_key(key: str) -> str:
    """Return `key` unchanged; raise `StoreError` if it is not a valid key."""
    if any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
        raise StoreError(f"{key!r} is not a valid key: use relative names without empty, '.' or '..' parts")
    return key
