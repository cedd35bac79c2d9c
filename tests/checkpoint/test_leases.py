"""Leases: every attempt gets its own number, and only the newest is valid."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.leases import Lease
from bam_ray.errors import StaleLease

PREFIX = "branches/code-1"


def test_attempts_are_numbered_from_one() -> None:
    store = MemoryStore()
    assert [Lease.take(store, PREFIX).number for _ in range(12)] == list(range(1, 13))
    assert Lease.take(store, "branches/law-1").number == 1


def test_only_the_newest_lease_is_valid() -> None:
    store = MemoryStore()
    first = Lease.take(store, PREFIX)
    first.check()
    second = Lease.take(store, PREFIX)
    second.check()
    with pytest.raises(StaleLease, match=f"attempt 1 at {PREFIX} is stale: attempt 2 took over"):
        first.check()
    second.check()


def test_leases_of_other_artifacts_are_ignored() -> None:
    store = MemoryStore()
    lease = Lease.take(store, PREFIX)
    Lease.take(store, f"{PREFIX}0")
    Lease.take(store, f"{PREFIX}0")
    lease.check()


def test_racing_attempts_get_different_numbers() -> None:
    store = MemoryStore()
    barrier = threading.Barrier(8)

    def take(_: int) -> Lease:
        barrier.wait()
        return Lease.take(store, PREFIX)

    with ThreadPoolExecutor(max_workers=8) as pool:
        leases = sorted(pool.map(take, range(8)), key=lambda lease: lease.number)
    assert [lease.number for lease in leases] == list(range(1, 9))
    leases[-1].check()
    for stale in leases[:-1]:
        with pytest.raises(StaleLease):
            stale.check()


def test_numbers_may_have_more_than_four_digits() -> None:
    store = MemoryStore()
    store.put(f"{PREFIX}/leases/9999.json", b"{}")
    assert [Lease.take(store, PREFIX).number for _ in range(3)] == [10000, 10001, 10002]
