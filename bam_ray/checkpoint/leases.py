"""Attempt numbers and leases: only the attempt with the highest number may commit an artifact.

Problem: a node that loses its network looks dead, so its task is restarted elsewhere. If the node comes back, two
processes write the same artifact, and neither knows of the other. Two drivers may also work on one store.

Design choice: each driver takes an epoch from the store by a conditional put, and numbers the attempts that it places
at a task. A number is therefore fixed before its attempt starts, and an attempt that was replaced has a lower number
than its successor, no matter when it runs again. An attempt takes its lease by writing `leases/<number>.json`. Before
each write, `check` lists the leases and raises `StaleLease` if there is a higher one.

Limits: a lease never expires and is never released; only a newer attempt ends it. A check does not lock the store, so
a stale attempt may still finish one put that it began before the newer one took its lease. Such a put is harmless,
because attempts never write files of the same name (see `artifacts`).
"""

import json
import re
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from bam_ray.blobs import BlobStore
from bam_ray.errors import BlobExists, StaleLease

EPOCHS = "epochs/"
_NUMBER = re.compile(r"(\d+)\.(\d+)")
_EPOCH = re.compile(EPOCHS + r"(\d+)\.json")


@dataclass(frozen=True, order=True)
class AttemptNumber:
    """The number of an attempt at a task: the epoch of its driver, and the driver's count of attempts at the task."""

    epoch: int
    count: int

    def __str__(self) -> str:
        """Return the number as it appears in keys; the order of strings is the order of numbers up to 9999."""
        return f"{self.epoch:04d}.{self.count:04d}"

    @staticmethod
    def parse(text: str) -> "AttemptNumber":
        """Return the number that `text` begins with; raises `ValueError` if it does not begin with one."""
        match = _NUMBER.match(text)
        if match is None:
            raise ValueError(f"{text!r} does not begin with the number of an attempt")
        return AttemptNumber(int(match[1]), int(match[2]))


class Lease:
    """The right of attempt `number` to write below a prefix of the store."""

    def __init__(self, store: BlobStore, prefix: str, number: AttemptNumber) -> None:
        self._store = store
        self._prefix = prefix
        self.number = number

    @staticmethod
    def take(store: BlobStore, prefix: str, number: AttemptNumber) -> "Lease":
        """Take the lease of attempt `number`; raise `StaleLease` if it was taken, or if a newer attempt exists."""
        try:
            store.put_if_absent(f"{prefix}/leases/{number}.json", holder())
        except BlobExists:
            raise StaleLease(f"attempt {number} at {prefix} was started before, by another process") from None
        lease = Lease(store, prefix, number)
        lease.check()
        return lease

    def check(self) -> None:
        """Raise `StaleLease` if a newer attempt has taken a lease."""
        newest = newest_attempt(self._store, self._prefix)
        if newest is not None and newest > self.number:
            raise StaleLease(f"attempt {self.number} at {self._prefix} is stale: attempt {newest} took over")


def newest_attempt(store: BlobStore, prefix: str) -> AttemptNumber | None:
    """Return the highest number that was taken at the artifact under `prefix`, or None."""
    names = (key.rpartition("/")[2] for key in store.list(f"{prefix}/leases/"))
    return max((AttemptNumber.parse(name) for name in names if _NUMBER.match(name)), default=None)


def take_epoch(store: BlobStore, description: bytes | None = None) -> int:
    """Take the next epoch of the store; processes that race get different epochs.

    Args:
        store: The store of the run.
        description: The content of the epoch's blob, which must be unique; None describes this process.
    """
    epoch = max((number for number, _ in epochs(store)), default=0)
    while True:
        epoch += 1
        try:
            store.put_if_absent(epoch_key(epoch), description or holder())
        except BlobExists:
            continue
        return epoch


def epochs(store: BlobStore) -> Iterator[tuple[int, str]]:
    """Yield the number and the key of each epoch that was taken."""
    for key in store.list(EPOCHS):
        match = _EPOCH.fullmatch(key)
        if match:
            yield int(match[1]), key


def epoch_key(epoch: int) -> str:
    """Return the key of the blob that describes the owner of an epoch."""
    return f"{EPOCHS}{epoch:06d}.json"


def holder() -> bytes:
    """Describe this process in a blob that equals no other, so that a writer can recognize its own."""
    taken = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "taken": taken, "token": secrets.token_hex(8)}).encode()
