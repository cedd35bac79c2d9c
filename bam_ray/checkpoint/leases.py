"""Leases: each attempt at an artifact takes the next number, and only the newest attempt may commit.

Problem: a node that loses its network looks dead, so its task is restarted elsewhere. If the node comes back, two
processes write the same artifact, and neither knows of the other.

Design choice: every attempt takes a number by a conditional put of `leases/<number>.json`, so racing attempts get
different numbers. An attempt writes its training checkpoints under its own number and therefore never overwrites those
of a newer one. Before it writes, `check` lists the leases and raises `StaleLease` if a newer one exists.

Limits: a lease never expires and is never released; only a newer attempt ends it. A check does not lock the store, so
a stale attempt may still finish one put that it began before the newer one took its lease. Such a put never damages a
training checkpoint of the newer attempt. If it replaces a file of a published artifact by other bytes, `fetch` refuses
the artifact, because the digest no longer matches.
"""

import json
import socket
from datetime import UTC, datetime

from bam_ray.blobs import BlobStore
from bam_ray.errors import BlobExists, StaleLease


class Lease:
    """The right of attempt `number` to write below a prefix of the store."""

    def __init__(self, store: BlobStore, prefix: str, number: int) -> None:
        self._store = store
        self._prefix = prefix
        self.number = number

    @staticmethod
    def take(store: BlobStore, prefix: str) -> "Lease":
        """Take the lease with the next number; attempts that race get different numbers."""
        number = _newest_number(store, prefix)
        holder = {"host": socket.gethostname(), "taken": datetime.now(UTC).isoformat(timespec="seconds")}
        while True:
            number += 1
            try:
                store.put_if_absent(_key(prefix, number), json.dumps(holder).encode())
            except BlobExists:
                continue
            return Lease(store, prefix, number)

    def check(self) -> None:
        """Raise `StaleLease` if a newer attempt has taken a lease."""
        newest = _newest_number(self._store, self._prefix)
        if newest != self.number:
            raise StaleLease(f"attempt {self.number} at {self._prefix} is stale: attempt {newest} took over")


def _key(prefix: str, number: int) -> str:
    return f"{prefix}/leases/{number:04d}.json"


def _newest_number(store: BlobStore, prefix: str) -> int:
    keys = list(store.list(f"{prefix}/leases/"))
    return int(keys[-1].rpartition("/")[2].removesuffix(".json")) if keys else 0
