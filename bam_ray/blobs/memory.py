"""A blob store in the memory of this process, for tests and simulations."""

import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

from bam_ray.blobs.store import sort_keys, validate_key
from bam_ray.errors import BlobExists, BlobNotFound


class MemoryStore:
    """A `BlobStore` in a dictionary; all operations that write are serialized by a lock."""

    _named: ClassVar[dict[str, "MemoryStore"]] = {}

    def __init__(self, name: str = "anonymous") -> None:
        self._name = name
        self._blobs: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @classmethod
    def named(cls, name: str) -> "MemoryStore":
        """Return the store called `name`, which all callers in this process share."""
        return cls._named.setdefault(name, cls(name))

    @property
    def uri(self) -> str:
        """The URI `memory://NAME`."""
        return f"memory://{self._name}"

    def put(self, key: str, data: bytes) -> None:
        """Write a copy of `data` to `key`."""
        with self._lock:
            self._blobs[validate_key(key)] = bytes(data)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write a copy of `data` to `key`; raise `BlobExists` if the key exists."""
        with self._lock:
            if validate_key(key) in self._blobs:
                raise BlobExists(f"{self.uri}/{key} exists already")
            self._blobs[key] = bytes(data)

    def put_file(self, key: str, path: Path) -> None:
        """Read the whole file at `path` and write it to `key`."""
        self.put(key, path.read_bytes())

    def put_stream(self, key: str, chunks: Iterator[bytes | memoryview], size: int | None = None) -> None:
        """Collect all `chunks`, then write them to `key`."""
        validate_key(key)
        data = bytearray()
        for chunk in chunks:
            data += chunk
        self.put(key, bytes(data))

    def get(self, key: str) -> bytes:
        """Return all bytes of `key`; raise `BlobNotFound` if it does not exist."""
        try:
            return self._blobs[validate_key(key)]
        except KeyError:
            raise BlobNotFound(f"{self.uri}/{key} does not exist") from None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return bytes [start, start + length) of `key`."""
        return self.get(key)[start : start + length]

    def get_file(self, key: str, path: Path) -> None:
        """Write the bytes of `key` to the file at `path`."""
        path.write_bytes(self.get(key))

    def size(self, key: str) -> int:
        """Return the length of `key` in bytes."""
        return len(self.get(key))

    def exists(self, key: str) -> bool:
        """Return True if `key` exists."""
        return validate_key(key) in self._blobs

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield all keys that begin with `prefix`, sorted, as they were at the first step of the iteration."""
        with self._lock:
            keys = sort_keys(key for key in self._blobs if key.startswith(prefix))
        yield from keys

    def delete(self, key: str) -> None:
        """Remove `key`; do nothing if it does not exist."""
        with self._lock:
            self._blobs.pop(validate_key(key), None)

    def abort_uploads(self, prefix: str, older_than: timedelta) -> Sequence[str]:
        """Return an empty list, because no upload outlives its writer."""
        return []
