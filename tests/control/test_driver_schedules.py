"""Random schedules of drivers that share a store: all work is finished, none of it is damaged, and none is given up."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import Lease
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.control.controller import Controller
from bam_ray.control.drivers import DriverRegistry
from bam_ray.control.observations import Alive, Crashed, Done, Queued
from bam_ray.errors import StaleLease, StoreUnavailable
from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import Progress, Task
from tests.support.control.scripted_launcher import ScriptedLauncher, make_task
from tests.support.failing_store import FailingStore
from tests.support.schedules.scheduler import write_files

NODE = Node("1", "one")
NAMES = ("a", "b", "c")
TASKS = [make_task("a", attempts=10**6), make_task("b", attempts=10**6), make_task("c", "a", "b", attempts=10**6)]


@dataclass
class SimulatedDriver:
    """A driver with its controller; its attempts are in the statuses of its launcher."""

    registry: DriverRegistry
    launcher: ScriptedLauncher
    controller: Controller


@dataclass
class RunningAttempt:
    """An attempt that has its lease, and may go on after its driver or its node was given up."""

    task: Task
    lease: Lease
    driver: SimulatedDriver

    @property
    def is_current(self) -> bool:
        """True if its driver still waits for it."""
        placed = self.driver.launcher.statuses.get(self.task.id)
        return isinstance(placed, Alive) and self.driver.launcher.numbers[self.task.id] == self.lease.number


class DriversOfAStore(RuleBasedStateMachine):
    """Drivers of one run that start, step, hang, and die in any order, with attempts that never stop by themselves."""

    drivers = Bundle("drivers")
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.store = FailingStore()
        self._folder = TemporaryDirectory()
        self._files = 0

    def teardown(self) -> None:
        """Heal everything, and check that one driver finishes the run."""
        self.store.failure, self.store.loses_next_answer = None, False
        last = self._new_driver()
        for _ in range(200):
            self.now += 10.0
            last.controller.step()
            last.registry.beat()
            for name in NAMES:
                if isinstance(last.launcher.statuses.get(name), Queued):
                    attempt = self._begin(last, name)
                    if attempt is not None:
                        self._publish(attempt)
            if last.controller.outcome() != "running":
                break
        assert last.controller.outcome() == "finished"
        for name in NAMES:
            self._artifact(name).check_files(self._manifest(name))
        self._folder.cleanup()

    @initialize(target=drivers)
    def first_driver(self) -> SimulatedDriver:
        return self._new_driver()

    @rule(target=drivers)
    def another_driver(self) -> SimulatedDriver:
        self.store.failure, self.store.loses_next_answer = None, False
        return self._new_driver()

    @rule(driver=drivers, seconds=st.sampled_from([1.0, 6.0, 61.0]))
    def step(self, driver: SimulatedDriver, seconds: float) -> None:
        self.now += seconds
        if self.store.failure is None:
            driver.registry.beat()
        try:
            driver.controller.step()
        except StoreUnavailable:  # the store was down for too long
            driver.launcher.statuses.clear()

    @rule(driver=consumes(drivers))
    def driver_dies(self, driver: SimulatedDriver) -> None:
        driver.launcher.statuses.clear()

    @rule(target=attempts, driver=drivers, name=st.sampled_from(NAMES))
    def begin(self, driver: SimulatedDriver, name: str) -> RunningAttempt | None:
        return self._begin(driver, name) if isinstance(driver.launcher.statuses.get(name), Queued) else None

    @rule(attempt=attempts)
    def publish(self, attempt: RunningAttempt | None) -> None:
        if attempt is not None:
            self._publish(attempt)

    @rule(attempt=consumes(attempts))
    def crash(self, attempt: RunningAttempt | None) -> None:
        if attempt is not None and attempt.is_current:
            attempt.driver.launcher.statuses[attempt.task.id] = Crashed("killed", NODE, node_fault=False)

    @rule(down=st.booleans())
    def outage(self, down: bool) -> None:
        self.store.failure = StoreUnavailable("the store is down") if down else None

    @rule()
    def lose_an_answer(self) -> None:
        self.store.loses_next_answer = True

    @invariant()
    def nothing_committed_is_damaged(self) -> None:
        failure, self.store.failure = self.store.failure, None
        for name in NAMES:
            manifest = self._artifact(name).manifest()
            if manifest is not None:
                self._artifact(name).check_files(manifest)
        self.store.failure = failure

    @invariant()
    def nothing_is_given_up(self) -> None:
        for driver in self._all:
            assert driver.controller.outcome() != "failed"

    _all: list[SimulatedDriver]

    def _new_driver(self) -> SimulatedDriver:
        registry = DriverRegistry(self.store, "demo", clock=lambda: self.now)
        launcher = ScriptedLauncher()
        controller = Controller(TASKS, self.store, launcher, lambda: self.now, drivers=registry)
        driver = SimulatedDriver(registry, launcher, controller)
        self._all = [*getattr(self, "_all", []), driver]
        return driver

    def _begin(self, driver: SimulatedDriver, name: str) -> RunningAttempt | None:
        task, number = driver.controller.tasks[name], driver.launcher.numbers[name]
        try:
            lease = Lease.take(self.store, self._artifact(name).prefix, number)
        except StaleLease as error:
            driver.launcher.statuses[name] = Crashed(str(error), NODE, stale=True)
        except StoreUnavailable as error:
            driver.launcher.statuses[name] = Crashed(str(error), NODE, store_fault=True)
        else:
            driver.launcher.statuses[name] = Alive(NODE, Progress(1, 10))
            return RunningAttempt(task, lease, driver)
        return None

    def _publish(self, attempt: RunningAttempt) -> None:
        self._files += 1
        folder = write_files(Path(self._folder.name, str(self._files)), f"publication {self._files}")
        manifest = Manifest(id=attempt.task.id, kind=attempt.task.kind, name=attempt.task.name)
        try:
            self._artifact(attempt.task.id).publish(folder, manifest, attempt.lease)
            status: object = Done(NODE, Progress(10, 10))
        except StaleLease as error:
            status = Crashed(str(error), NODE, stale=True)
        except StoreUnavailable as error:
            status = Crashed(str(error), NODE, store_fault=True)
        if attempt.is_current:
            attempt.driver.launcher.statuses[attempt.task.id] = status  # type: ignore[assignment]

    def _artifact(self, name: str) -> Artifact:
        return Artifact(self.store, TASKS[0].kind, name)

    def _manifest(self, name: str) -> Manifest:
        manifest = self._artifact(name).manifest()
        assert manifest is not None
        return manifest


TestDriversOfAStore = DriversOfAStore.TestCase
TestDriversOfAStore.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
