"""The pool of adapters: slots, leases, budgets and failures under any order of events."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bam_ray.adapters.pool import AdapterLease, AdapterPool
from bam_ray.adapters.source import AdapterKey
from bam_ray.adapters.weights import AdapterWeights, LoraPair
from bam_ray.errors import AdapterUnavailable, CheckpointError, DigestMismatch, Overloaded, StoreUnavailable

ADAPTER_BYTES = 32
KEYS = [AdapterKey(f"topic-{number}", "1") for number in range(6)]


class ManualExecutor(Executor):
    """An executor whose work is done when the test says so."""

    def __init__(self) -> None:
        self.work: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.work.append((future, lambda: fn(*args, **kwargs)))
        return future

    def finish(self, place: int = 0) -> None:
        future, work = self.work.pop(place)
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)


@dataclass
class MemorySource:
    """Adapters that may be damaged or away."""

    tier: str = "store"
    faults: dict[str, Exception] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)

    def keys(self) -> Mapping[str, AdapterKey]:
        return {key.name: key for key in KEYS}

    def fetch(self, key: AdapterKey) -> AdapterWeights:
        self.fetched.append(key.name)
        if key.name in self.faults:
            raise self.faults[key.name]
        return AdapterWeights(key.name, 1.0, {"layer": LoraPair(torch.zeros(1, 4), torch.zeros(4, 1))})


@dataclass
class ModelDevice:
    """Slots that know what was written to them."""

    slots: int
    content: dict[int, str] = field(default_factory=dict)
    used: Callable[[], set[int]] = set

    def check(self, weights: AdapterWeights) -> None:
        pass

    def write(self, slot: int, weights: AdapterWeights) -> None:
        assert 1 <= slot <= self.slots
        assert slot not in self.used(), "a slot with a lease was overwritten"
        self.content[slot] = weights.name


class Pool:
    """A pool with all that it needs."""

    def __init__(self, slots: int = 2, host: int = 3, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.now = 0.0
        self.source, self.device, self.executor = MemorySource(), ModelDevice(slots), ManualExecutor()
        self.pool = AdapterPool(
            self.source, self.device, self.executor, host_bytes=host * ADAPTER_BYTES, clock=lambda: self.now, **options
        )

    def settle(self) -> None:
        """Run everything that does not wait for the executor."""
        for _ in range(12):
            self.loop.run_until_complete(asyncio.sleep(0))

    def start(self, work: Coroutine[Any, Any, AdapterLease]) -> asyncio.Task[AdapterLease]:
        task = self.loop.create_task(work)
        self.settle()
        return task

    def acquire(self, number: int) -> asyncio.Task[AdapterLease]:
        return self.start(self.pool.acquire(KEYS[number]))

    def release(self, lease: AdapterLease) -> None:
        """Release a lease on the event loop."""
        self.loop.call_soon(lease.release)
        self.settle()

    def finish_all(self) -> None:
        while self.executor.work:
            self.executor.finish()
            self.settle()


class PoolMachine(RuleBasedStateMachine):
    """Requests come, leave and end in any order, while the source is damaged, away and back."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = Pool(slots=2, host=3, max_waiting=8)
        self.parts.device.used = lambda: {lease.slot for lease in self.leases}
        self.requests: list[tuple[AdapterKey, asyncio.Task[AdapterLease]]] = []
        self.leases: list[AdapterLease] = []

    def collect(self) -> None:
        """Take the leases of the requests that have one."""
        self.parts.settle()
        for key, task in [each for each in self.requests if each[1].done()]:
            self.requests.remove((key, task))
            if task.cancelled():
                continue
            if (error := task.exception()) is None:
                assert task.result().key == key
                self.leases.append(task.result())
            else:
                assert isinstance(error, AdapterUnavailable | Overloaded)
                assert error.retry_after > 0

    @rule(number=st.integers(0, len(KEYS) - 1))
    def acquire(self, number: int) -> None:
        self.requests.append((KEYS[number], self.parts.acquire(number)))
        self.collect()

    @precondition(lambda self: self.parts.executor.work)
    @rule(data=st.data())
    def finish_a_load(self, data: st.DataObject) -> None:
        self.parts.executor.finish(data.draw(st.integers(0, len(self.parts.executor.work) - 1)))
        self.collect()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), twice=st.booleans())
    def release(self, data: st.DataObject, twice: bool) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        for _ in range(1 + twice):
            self.parts.release(lease)
        self.collect()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.requests[data.draw(st.integers(0, len(self.requests) - 1))][1].cancel()
        self.collect()

    @rule(number=st.integers(0, len(KEYS) - 1), kind=st.sampled_from([DigestMismatch, StoreUnavailable, OSError, None]))
    def damage(self, number: int, kind: type[Exception] | None) -> None:
        if kind is None:
            self.parts.source.faults.pop(KEYS[number].name, None)
        else:
            self.parts.source.faults[KEYS[number].name] = kind("broken")

    @rule(seconds=st.sampled_from([0.1, 3.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.parts.now += seconds

    @invariant()
    def leased_slots_hold_their_adapters(self) -> None:
        for lease in self.leases:
            assert self.parts.device.content[lease.slot] == lease.key.name
        assert len({(lease.slot, lease.key) for lease in self.leases}) == len({lease.slot for lease in self.leases})

    @invariant()
    def budgets_hold(self) -> None:
        pool = self.parts.pool
        assert pool.host_used == ADAPTER_BYTES * len(pool.hosted) <= 3 * ADAPTER_BYTES
        assert len(pool.resident) <= 2
        assert len(self.parts.executor.work) <= 2 * 2 + 2  # loads ahead are as many as slots

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """Check that requests wait only for a load or for a lease."""
        if self.requests and not self.leases:
            assert self.parts.executor.work

    def teardown(self) -> None:
        """When all leases end and the source works, every request is served."""
        self.parts.source.faults.clear()
        while self.requests or self.leases:
            self.parts.finish_all()
            self.collect()
            for lease in self.leases:
                self.parts.release(lease)
            self.leases.clear()
            self.collect()
        self.parts.loop.close()


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
test_any_order_of_events = PoolMachine.TestCase


def test_requests_share_one_load() -> None:
    parts = Pool()
    tasks = [parts.acquire(0) for _ in range(5)]
    parts.finish_all()
    assert {task.result().slot for task in tasks} == {1}
    assert [task.result().tier for task in tasks] == ["store"] + ["store"] * 4
    assert parts.source.fetched == ["topic-0"]
    assert parts.acquire(0).result().tier == "device"


def test_the_least_recently_used_adapter_makes_way() -> None:
    parts = Pool(slots=2, host=2)
    for number in (0, 1, 0, 2):
        task = parts.acquire(number)
        parts.finish_all()
        parts.release(task.result())
    assert set(parts.pool.resident) == {KEYS[0], KEYS[2]}
    assert parts.pool.hosted == [KEYS[1], KEYS[2]]
    assert parts.pool.tier(KEYS[3]) == "store"


def test_adapters_that_wait_are_loaded_once() -> None:
    parts = Pool(slots=2, host=2)
    tasks = {number: parts.acquire(number) for number in range(6)}
    while tasks:
        parts.finish_all()
        ready = [number for number, task in tasks.items() if task.done()]
        assert ready
        for number in ready:
            parts.release(tasks.pop(number).result())
    assert parts.pool.counts.fetches == 6


def test_a_request_waits_for_a_slot_for_a_bounded_time() -> None:
    parts = Pool(slots=1, max_wait_seconds=2.0)
    first = parts.acquire(0)
    parts.finish_all()
    other = parts.acquire(1)
    parts.finish_all()
    early = parts.acquire(0)
    assert early.done() and not other.done()  # requests for the adapter in the slot still pass
    parts.now = 2.0
    late = parts.acquire(0)
    assert not late.done()
    parts.release(first.result())
    parts.release(early.result())
    parts.finish_all()
    assert other.done() and not late.done()
    parts.release(other.result())
    parts.finish_all()
    assert late.done()


def test_a_failed_load_is_not_repeated_at_once(caplog: pytest.LogCaptureFixture) -> None:
    parts = Pool()
    parts.source.faults["topic-0"] = CheckpointError("the file is damaged: train the adapter again")
    waits = []
    for seconds in (0.0, 0.5, 1.0, 4.0):
        parts.now = seconds
        task = parts.acquire(0)
        parts.finish_all()
        error = task.exception()
        assert isinstance(error, AdapterUnavailable)
        waits.append(error.retry_after)
    assert waits == [1.0, 0.5, 2.0, 4.0]
    assert len(parts.source.fetched) == caplog.text.count("the file is damaged") == 3
    parts.source.faults.clear()
    parts.now = 9.0
    task = parts.acquire(0)
    parts.finish_all()
    assert task.result().slot == 1


def test_too_many_waiting_requests_are_refused() -> None:
    parts = Pool(slots=1, max_waiting=2)
    parts.acquire(0)
    parts.finish_all()
    waiting = [parts.acquire(1), parts.acquire(2)]
    with pytest.raises(Overloaded, match="2 requests wait for an adapter slot: retry"):
        parts.loop.run_until_complete(parts.pool.acquire(KEYS[3]))
    parts.loop.run_until_complete(parts.pool.close())
    parts.settle()
    assert all(isinstance(task.exception(), AdapterUnavailable) for task in waiting)
