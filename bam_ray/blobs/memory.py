"""A blob store in this process's memory, for tests."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from bam_ray.blobs.store import checked
from bam_ray.errors import BlobExists, BlobNotFound


class MemoryStore:
    """A `BlobStore` in a dictionary. Stores of the same name share their contents within the process."""

    _named: ClassVar[dict[str, "MemoryStore"]] = {}

    def __init__(self, name: str = "anonymous") -> None:
        self._name = name
        self._blobs: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @classmethod
    def named(cls, name: str) -> "MemoryStore":
        """The one store called `name`."""
        return cls._named.setdefault(name, cls(name))

    @property
    def uri(self) -> str:
        return f"memory://{self._name}"

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._blobs[checked(key)] = bytes(data)

    def put_if_absent(self, key: str, data: bytes) -> None:
        with self._lock:
            if checked(key) in self._blobs:
                raise BlobExists(f"{self.uri}/{key} exists already")
            self._blobs[key] = bytes(data)

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def put_stream(self, key: str, chunks: Iterator[bytes | memoryview]) -> None:
        checked(key)
        data = bytearray()
        for chunk in chunks:
            data += chunk
        self.put(key, bytes(data))

    def get(self, key: str) -> bytes:
        try:
            return self._blobs[checked(key)]
        except KeyError:
            raise BlobNotFound(f"{self.uri}/{key} does not exist") from None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self.get(key)[start : start + length]

    def get_file(self, key: str, path: Path) -> None:
        path.write_bytes(self.get(key))

    def size(self, key: str) -> int:
        return len(self.get(key))

    def exists(self, key: str) -> bool:
        return checked(key) in self._blobs

    def list(self, prefix: str = "") -> Iterator[str]:
        with self._lock:
            keys = sorted(key for key in self._blobs if key.startswith(prefix))
        yield from keys

    def delete(self, key: str) -> None:
        with self._lock:
            self._blobs.pop(checked(key), None)
