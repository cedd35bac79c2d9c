"""The blob store: bytes by key. Everything durable that this project makes lies in one.

Keys are `/`-separated, relative, without `.` or `..` parts. A put is all or nothing: a reader sees the old bytes,
the new bytes or nothing, never a part. `put_if_absent` is atomic among racing writers: exactly one wins.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from bam_ray.errors import StoreError


class BlobStore(Protocol):
    """Bytes by key, over a folder, an S3 bucket or memory.

    Every method raises `StoreDenied` or `StoreUnavailable` where the store itself fails.
    """

    @property
    def uri(self) -> str:
        """Where this store lies, as given to `open_store`, without a trailing slash."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write `data` at `key`, over what was there."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write `data` at `key`; raises `BlobExists` where the key is there already."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Upload a file of any size (S3: multipart)."""
        ...

    def put_stream(self, key: str, chunks: Iterator[bytes | memoryview]) -> None:
        """Write what `chunks` gives, of unknown length, over what was at `key`, in bounded memory.

        Where `chunks` raises, its own exception passes unchanged and nothing of the blob is visible. A chunk is copied
        before the next one is asked for, so its buffer may be used again. S3 takes at most 78 GiB this way.
        """
        ...

    def get(self, key: str) -> bytes:
        """All bytes of `key`; raises `BlobNotFound`."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of `key`, shorter at its end; raises `BlobNotFound`."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Download `key` to `path`, whose folder must exist; raises `BlobNotFound`."""
        ...

    def size(self, key: str) -> int:
        """Length of `key` in bytes; raises `BlobNotFound`."""
        ...

    def exists(self, key: str) -> bool:
        """Whether `key` is there."""
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """All keys that begin with `prefix`, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens where it is not there."""
        ...


def checked(key: str) -> str:
    """`key`, where it is one; raises `StoreError`."""
    if any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
        raise StoreError(f"{key!r} is not a key: use relative names without empty, '.' or '..' parts")
    return key
