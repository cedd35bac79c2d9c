"""Leases: every attempt at an artifact takes the next number, and only the newest may commit.

A stale attempt (a zombie on a node that was cut off and came back) writes its step checkpoints under its own number,
so it can never write over a newer one's, and `check` tells it to stop.
"""

import json
import socket
from datetime import UTC, datetime

from bam_ray.blobs import BlobStore
from bam_ray.errors import BlobExists, StaleLease


class Lease:
    """The right of attempt `number` to write under `prefix`."""

    def __init__(self, store: BlobStore, prefix: str, number: int) -> None:
        self._store = store
        self._prefix = prefix
        self.number = number

    @staticmethod
    def take(store: BlobStore, prefix: str) -> "Lease":
        """Take the next number; racing takers get different ones."""
        number = _newest(store, prefix)
        holder = {"host": socket.gethostname(), "taken": datetime.now(UTC).isoformat(timespec="seconds")}
        while True:
            number += 1
            try:
                store.put_if_absent(_key(prefix, number), json.dumps(holder).encode())
            except BlobExists:
                continue
            return Lease(store, prefix, number)

    def check(self) -> None:
        """Raise `StaleLease` where a newer attempt exists."""
        newest = _newest(self._store, self._prefix)
        if newest != self.number:
            raise StaleLease(f"attempt {self.number} at {self._prefix} is stale: attempt {newest} took over")


def _key(prefix: str, number: int) -> str:
    return f"{prefix}/leases/{number:04d}.json"


def _newest(store: BlobStore, prefix: str) -> int:
    keys = list(store.list(f"{prefix}/leases/"))
    return int(keys[-1].rpartition("/")[2].removesuffix(".json")) if keys else 0
