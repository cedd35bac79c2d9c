"""Attempts have numbers that are fixed before they start, and only the newest attempt may write."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.leases import AttemptNumber, Lease, newest_attempt, take_epoch
from bam_ray.errors import StaleLease

PREFIX = "branches/code-1"


def take(store: MemoryStore, epoch: int, count: int) -> Lease:
    return Lease.take(store, PREFIX, AttemptNumber(epoch, count))


def test_only_the_newest_lease_is_valid() -> None:
    store = MemoryStore()
    first = take(store, 1, 1)
    first.check()
    second = take(store, 1, 2)
    second.check()
    with pytest.raises(StaleLease, match=f"attempt 0001.0001 at {PREFIX} is stale: attempt 0001.0002 took over"):
        first.check()
    second.check()


def test_an_attempt_that_starts_late_is_stale_at_once() -> None:
    store = MemoryStore()
    newer = take(store, 1, 2)
    with pytest.raises(StaleLease, match=r"attempt 0001\.0002 took over"):
        take(store, 1, 1)
    newer.check()


def test_a_number_is_used_once() -> None:
    store = MemoryStore()
    take(store, 1, 1)
    with pytest.raises(StaleLease, match="was started before, by another process"):
        take(store, 1, 1)


def test_attempts_of_a_later_driver_are_newer() -> None:
    store = MemoryStore()
    first = take(store, 1, 7)
    take(store, 2, 1).check()
    with pytest.raises(StaleLease):
        first.check()


def test_leases_of_other_artifacts_are_ignored() -> None:
    store = MemoryStore()
    lease = take(store, 1, 1)
    Lease.take(store, f"{PREFIX}0", AttemptNumber(1, 1))
    Lease.take(store, f"{PREFIX}0", AttemptNumber(1, 2))
    lease.check()


def test_racing_processes_get_different_epochs() -> None:
    store = MemoryStore()
    barrier = threading.Barrier(8)

    def race(_: int) -> int:
        barrier.wait()
        return take_epoch(store)

    with ThreadPoolExecutor(max_workers=8) as pool:
        assert sorted(pool.map(race, range(8))) == list(range(1, 9))


def test_numbers_may_have_more_than_four_digits() -> None:
    store = MemoryStore()
    take(store, 1, 9999).check()
    lease = take(store, 1, 10000)
    lease.check()
    assert newest_attempt(store, PREFIX) == AttemptNumber(1, 10000)
    take(store, 10000, 1).check()
    with pytest.raises(StaleLease):
        lease.check()


@pytest.mark.parametrize("number", [AttemptNumber(1, 2), AttemptNumber(12345, 67890)])
def test_a_number_can_be_read_from_its_text(number: AttemptNumber) -> None:
    assert AttemptNumber.parse(f"{number}-00000040") == number
    with pytest.raises(ValueError, match="does not begin with the number of an attempt"):
        AttemptNumber.parse("7-00000040")
