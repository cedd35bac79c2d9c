"""Drivers that share a store leave each other's tasks alone, and take over what a driver that is gone has left."""

import json
import os
import subprocess
import sys
import time

import pytest

from bam_ray.blobs import patience
from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.leases import AttemptNumber, Lease, epoch_key
from bam_ray.control.controller import Controller
from bam_ray.control.drivers import DRIVER_TIMEOUT, HEARTBEATS, DriverRegistry
from bam_ray.control.observations import Alive, Crashed, Done
from bam_ray.errors import StoreBusy, StoreDenied, StoreError
from bam_ray.pipeline.states import Committed, MadeElsewhere, Node, Placing, Running, Waiting
from bam_ray.pipeline.tasks import Progress, Task
from tests.support.control.scripted_launcher import ScriptedLauncher, commit_task, make_task
from tests.support.failing_store import FailingStore

NODE = Node("1", "one")
STALE = Crashed("attempt 0001.0001 is stale", NODE, stale=True)


class Clock:
    """The clock of all drivers of a test."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TestDriver:
    """One driver: its registry, its controller and its launcher."""

    __test__ = False

    def __init__(self, store: MemoryStore, clock: Clock, *tasks: Task, take_over: bool = False) -> None:
        self.store, self.clock = store, clock
        self.registry = DriverRegistry(store, "demo", take_over, clock)
        self.launcher = ScriptedLauncher()
        self.controller = Controller(tasks, store, self.launcher, clock, drivers=self.registry)

    def step(self, **statuses: object) -> None:
        """Write a heartbeat, set the statuses of attempts, and let the controller make one step."""
        self.registry.beat()
        self.launcher.statuses.update(statuses)  # type: ignore[arg-type]
        self.controller.step()

    def start(self, name: str) -> None:
        """Let a node start the attempt at a task, which takes its lease."""
        Lease.take(self.store, f"branches/{name}", self.launcher.numbers[name])
        self.step(**{name: Alive(NODE, Progress(1, 10))})

    def state(self, name: str) -> object:
        return self.controller.states[name]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_each_driver_has_an_epoch_of_its_own(store: MemoryStore) -> None:
    assert [DriverRegistry(store, "demo").epoch for _ in range(3)] == [1, 2, 3]


def test_a_second_driver_waits_for_the_task_of_the_first(store: MemoryStore, clock: Clock) -> None:
    first, second = (TestDriver(store, clock, make_task("a"), make_task("b", "a")) for _ in range(2))
    first.step()
    first.start("a")
    second.step()
    state = second.state("a")
    assert isinstance(state, MadeElsewhere)
    assert "the driver of demo on" in state.driver
    assert second.launcher.placed == []
    commit_task(store, make_task("a"))
    clock.now += 10.0
    second.step()
    assert isinstance(second.state("a"), Committed)
    assert isinstance(second.state("b"), Placing), "the first has not begun it"


def test_a_second_driver_sees_a_task_that_has_no_lease_yet(store: MemoryStore, clock: Clock) -> None:
    first, second = (TestDriver(store, clock, make_task("a")) for _ in range(2))
    first.step()
    first.registry.beat()
    second.step()
    assert isinstance(second.state("a"), MadeElsewhere), "the first waits for a node"
    first.step(a=Crashed("out of luck", NODE))
    first.registry.beat()
    clock.now += 10.0
    second.step()
    assert isinstance(second.state("a"), Placing), "the first does not make it any more"


def test_a_task_that_another_driver_made_ready_is_looked_at(store: MemoryStore, clock: Clock) -> None:
    first, second = (TestDriver(store, clock, make_task("a"), make_task("b", "a")) for _ in range(2))
    first.step()
    first.start("a")
    second.step()
    commit_task(store, make_task("a"))
    first.step(a=Done(NODE, Progress(10, 10)))
    first.registry.beat()
    clock.now += 10.0
    second.step()
    assert isinstance(second.state("a"), Committed)
    assert isinstance(second.state("b"), MadeElsewhere), "the first has begun it"
    assert second.launcher.placed == []


def test_a_driver_that_begins_a_task_says_so_at_once(store: MemoryStore, clock: Clock) -> None:
    first, second = (TestDriver(store, clock, make_task("a")) for _ in range(2))
    with first.registry.beating():
        first.controller.step()
        until = time.monotonic() + 4.0  # less than the time between two heartbeats
        while not isinstance(second.state("a"), MadeElsewhere) and time.monotonic() < until:
            time.sleep(0.05)
            second.registry.refresh(at_once=True)
            if second.registry.owner_of("branches/a"):
                second.controller.step()
    assert isinstance(second.state("a"), MadeElsewhere)


@pytest.mark.parametrize("ended", [True, False])
def test_a_driver_takes_over_from_one_that_is_gone(store: MemoryStore, clock: Clock, ended: bool) -> None:
    first, second = (TestDriver(store, clock, make_task("a")) for _ in range(2))
    first.step()
    first.start("a")
    second.step()
    assert isinstance(second.state("a"), MadeElsewhere)
    if ended:
        first.registry.beat(ended=True)
    for _ in range(6):
        clock.now += DRIVER_TIMEOUT / 5
        second.step()
    assert isinstance(second.state("a"), Placing)
    assert second.launcher.numbers["a"] > first.launcher.numbers["a"]


def test_a_driver_that_beats_is_not_gone(store: MemoryStore, clock: Clock) -> None:
    first, second = (TestDriver(store, clock, make_task("a")) for _ in range(2))
    first.step()
    first.start("a")
    for _ in range(30):
        clock.now += 30.0
        first.step()
        second.step()
    assert isinstance(second.state("a"), MadeElsewhere)


def test_take_over_does_not_wait(store: MemoryStore, clock: Clock) -> None:
    first = TestDriver(store, clock, make_task("a"))
    first.step()
    first.start("a")
    second = TestDriver(store, clock, make_task("a"), take_over=True)
    second.step()
    assert isinstance(second.state("a"), Placing)
    second.start("a")
    first.step(a=STALE)
    clock.now += 10.0
    first.step()
    assert isinstance(first.state("a"), MadeElsewhere), "a driver that was replaced waits for its successor"


def test_a_stale_attempt_is_no_failure(store: MemoryStore, clock: Clock) -> None:
    driver = TestDriver(store, clock, make_task("a", attempts=1))
    driver.step()
    driver.start("a")
    Lease.take(store, "branches/a", AttemptNumber(7, 1))  # of a process that is unknown
    driver.step(a=STALE)
    assert not driver.state("a").is_final  # type: ignore[attr-defined]
    clock.now += 10.0
    driver.step()
    assert isinstance(driver.state("a"), Placing)
    assert driver.launcher.numbers["a"] > AttemptNumber(7, 1), "the driver takes a new epoch"


def test_a_damaged_task_is_checked_although_another_driver_lives(store: MemoryStore, clock: Clock) -> None:
    commit_task(store, make_task("a"))
    TestDriver(store, clock, make_task("c")).step()
    driver = TestDriver(store, clock, make_task("a"), make_task("b", "a"))
    driver.step()
    clock.now += 10.0
    driver.step(b=Crashed("a file is damaged", NODE, damaged="a"))
    assert driver.registry.has_company
    assert isinstance(driver.state("a"), Placing)
    assert driver.controller.history("a").suspect


def test_an_abandoned_task_is_made_by_another_driver(store: MemoryStore, clock: Clock) -> None:
    first, second = (TestDriver(store, clock, make_task("a", attempts=1), make_task("b")) for _ in range(2))
    first.step()
    first.start("a")
    second.step()
    assert isinstance(second.state("a"), MadeElsewhere)
    first.step(a=Crashed("out of luck", NODE))
    for _ in range(3):
        clock.now += 10.0
        first.step()
        second.step()
    assert isinstance(second.state("a"), Placing)


def test_a_process_that_died_on_this_machine_is_gone_at_once(store: MemoryStore, clock: Clock) -> None:
    first = TestDriver(store, clock, make_task("a"))
    first.step()
    first.start("a")
    key = epoch_key(first.registry.epoch)
    description = json.loads(store.get(key))
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
        store.put(key, json.dumps({**description, "pid": process.pid}).encode())
    second = TestDriver(store, clock, make_task("a"))
    second.step()
    assert isinstance(second.state("a"), Placing)
    assert description["pid"] == os.getpid()


def test_a_store_that_fails_for_minutes_stops_nothing(clock: Clock) -> None:
    store = FailingStore()
    driver = TestDriver(store, clock, make_task("a"), make_task("b"))
    driver.step()
    driver.start("a")
    store.failure = StoreDenied("AccessDenied")
    driver.launcher.statuses["a"] = Done(NODE, Progress(10, 10))
    for _ in range(9):
        clock.now += 60.0
        driver.controller.step()
        assert isinstance(driver.state("a"), Running), "its manifest could not be looked for"
        assert driver.controller.store_warning == "AccessDenied"
    store.failure = None
    commit_task(store, make_task("a"))
    clock.now += 10.0
    driver.controller.step()
    assert isinstance(driver.state("a"), Committed)
    assert driver.controller.store_warning == ""


def test_a_store_that_fails_for_longer_ends_the_run(clock: Clock) -> None:
    store = FailingStore()
    driver = TestDriver(store, clock, make_task("a"))
    driver.step()
    store.failure = StoreDenied("AccessDenied")
    clock.now += 10.0
    driver.controller.step()
    clock.now += 601.0
    with pytest.raises(StoreError, match="AccessDenied"):
        driver.controller.step()


def test_a_store_that_fails_at_the_start_is_asked_later(clock: Clock) -> None:
    store = FailingStore()
    commit_task(store, make_task("a"))
    registry = DriverRegistry(store, "demo", clock=clock)
    store.failure = StoreDenied("AccessDenied")
    controller = Controller([make_task("a")], store, ScriptedLauncher(), clock, drivers=registry)
    assert isinstance(controller.states["a"], Waiting)


def test_a_driver_that_starts_asks_a_busy_store_again(clock: Clock) -> None:
    store = FailingStore()
    store.failure = StoreBusy("SlowDown")
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        store.loses_next_answer = store.failure is not None  # of the put that takes the epoch
        store.failure = None

    registry = DriverRegistry(store, "demo", take_over=True, clock=clock, report=report)
    assert [line.partition(":")[0] for line in lines] == ["SlowDown", "the answer was lost"]
    assert registry.epoch == 2, "the put whose answer was lost has taken epoch 1"
    other = DriverRegistry(store, "demo", clock=clock)
    assert len(list(store.list(HEARTBEATS))) == 2, "one of each driver"
    other.refresh(at_once=True)
    assert other.has_company
    registry.beat(ended=True)
    other.refresh(at_once=True)
    assert not other.has_company, "nothing of the driver is left to wait for"


def test_a_store_that_stays_busy_ends_the_start(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.0)
    store = FailingStore()
    store.failure = StoreBusy("SlowDown")
    with pytest.raises(StoreBusy, match="SlowDown"):
        DriverRegistry(store, "demo", clock=clock)
