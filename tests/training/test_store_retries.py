"""Operations on a store are repeated for minutes while the store is unavailable or denies them."""

import time
from collections.abc import Iterator

import pytest

from bam_ray.errors import BlobNotFound, StoreDenied, StoreError, StoreUnavailable
from bam_ray.training.checkpoints import DENIED_TIMEOUT, STORE_TIMEOUT, retry_while_unavailable


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Replace the clock by one that only sleeping advances; return all sleeps."""
    sleeps: list[float] = []
    monkeypatch.setattr(time, "sleep", sleeps.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(sleeps))
    yield sleeps
    monkeypatch.undo()


class FailingStore:
    """An operation that fails until a moment, with an error that depends on the time."""

    def __init__(self, slept: list[float], failures: list[tuple[float, type[StoreError]]]) -> None:
        self._slept = slept
        self._failures = failures

    def __call__(self) -> str:
        for end, error in self._failures:
            if sum(self._slept) < end:
                raise error("it failed")
        return "done"


@pytest.mark.parametrize(
    ("error", "limit"), [(StoreUnavailable, STORE_TIMEOUT), (StoreDenied, DENIED_TIMEOUT)], ids=["down", "denied"]
)
def test_failures_are_repeated_for_a_while(slept: list[float], error: type[StoreError], limit: float) -> None:
    assert retry_while_unavailable()(FailingStore(slept, [(limit - 1, error)])) == "done"
    slept.clear()
    with pytest.raises(error, match="it failed"):
        retry_while_unavailable()(FailingStore(slept, [(1e9, error)]))
    assert limit <= sum(slept) <= limit + 30


def test_denials_after_an_outage_have_their_own_time(slept: list[float]) -> None:
    outage_then_denials = [(STORE_TIMEOUT - 40, StoreUnavailable), (STORE_TIMEOUT + 60, StoreDenied)]
    assert retry_while_unavailable()(FailingStore(slept, outage_then_denials)) == "done"


def test_other_errors_are_not_repeated(slept: list[float]) -> None:
    with pytest.raises(BlobNotFound):
        retry_while_unavailable()(FailingStore(slept, [(1e9, BlobNotFound)]))
    assert slept == []
