"""The driver of a run, inside a Ray job or on any machine of the cluster: controller, launcher, status and table.

The driver keeps no durable state. A run whose driver was killed resumes when it is submitted again.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError

from bam_ray.blobs import BlobStore
from bam_ray.blobs.check import open_checked_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control import status
from bam_ray.control.controller import Controller, RunOutcome
from bam_ray.control.drivers import DriverRegistry
from bam_ray.control.status_table import render
from bam_ray.control.transitions import Transition
from bam_ray.errors import PlacementError, StoreError, one_line
from bam_ray.on_ray.deaths import protect_driver
from bam_ray.on_ray.launcher import RayLauncher
from bam_ray.on_ray.work import StageFunctions
from bam_ray.pipeline.graph import subset
from bam_ray.pipeline.run import PipelineRun
from bam_ray.pipeline.states import MadeElsewhere
from bam_ray.planning.maturity import maturity_warning
from bam_ray.planning.memory import with_memory_requests
from bam_ray.planning.model_size import seed_size
from bam_ray.settings import Recipe
from bam_ray.terminal import terminal_console, warn

if TYPE_CHECKING:
    from bam_ray.training.engine import EngineFactory

STEP_SECONDS = 0.5  # time between two steps of the controller
STATUS_SECONDS = 2.0  # longest time between two writes of status.json
REPORT_SHARE = 20.0  # after a report, the driver works this many times longer on other things than the report took
TABLE_SECONDS = 30.0  # longest time between two prints of the table
TABLE_WIDTH = 110  # characters


def run_tasks(
    recipe: Recipe,
    kinds: Collection[ArtifactKind] | None = None,
    engine_factory: "EngineFactory | None" = None,
    functions: StageFunctions | None = None,
    take_over: bool = False,
) -> RunOutcome:
    """Make all artifacts of `kinds` and everything that they are made from, and return the outcome.

    After SIGTERM or SIGINT, all running tasks write a checkpoint before this returns. Errors of tasks are shown in the
    table and are not raised.

    Args:
        recipe: The recipe of the run.
        kinds: Kinds of artifacts to make. None stands for all.
        engine_factory: Makes the engines of process groups.
        functions: Replacements for the functions that run a stage.
        take_over: Do not wait for other drivers that have worked on this store; treat them as gone.

    Raises:
        StoreError: The blob store cannot be used.
        PlacementError: There is no cluster.
    """
    store, weaker = open_checked_store(recipe.store, warn)  # reports wrong credentials and a missing bucket at once
    size = seed_size(recipe, warn)
    for warning in (weaker, maturity_warning(recipe, size)):
        if warning:
            warn(warning)
    connect()
    protect_driver()
    run = PipelineRun.of(recipe, store)
    run = replace(run, tasks=with_memory_requests(run.tasks, recipe, size))
    drivers = DriverRegistry(store, recipe.name, take_over, report=warn)
    launcher = RayLauncher(run, engine_factory, functions)
    tasks = run.tasks if kinds is None else subset(run.tasks, kinds)
    controller = Controller(tasks, store, launcher, drivers=drivers)
    controller.hang_timeout = float(os.environ.get("BAM_HANG_SECONDS", controller.hang_timeout))
    stop_on_signals(controller)
    reporter = StatusReporter(recipe.name, controller, store)
    with drivers.beating():
        try:
            outcome = controller.run(STEP_SECONDS, reporter)
        finally:
            launcher.close()
    reporter.write()
    return outcome


class PacedReport:
    """A report that is made at regular intervals and after changes, and that takes little of the driver's time.

    Args:
        make: Makes the report.
        interval: The longest time between two reports, in seconds.
        clock: Returns the time in seconds, from any origin.
    """

    def __init__(
        self, make: Callable[[], object], interval: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make, self._interval, self._clock = make, interval, clock
        self._made_at = float("-inf")
        self._cost = 0.0  # seconds that the last report took

    def make_if_due(self, changed: bool) -> None:
        """Make the report if something has changed or the interval is over; later if it takes long to make."""
        now = self._clock()
        pause = REPORT_SHARE * self._cost
        if now - self._made_at >= (pause if changed else max(self._interval, pause)):
            self._make()
            self._made_at = self._clock()
            self._cost = self._made_at - now


class StatusReporter:
    """A writer of `status.json` and the printed table, at regular intervals and when a task has changed its state.

    Other drivers that make tasks of this run, and failures of the store, are printed as they are noticed.
    """

    def __init__(self, run: str, controller: Controller, store: BlobStore) -> None:
        self._run = run
        self._controller = controller
        self._store = store
        self._console = terminal_console(width=TABLE_WIDTH, file=sys.stdout)
        self._reports = (PacedReport(self.write, STATUS_SECONDS), PacedReport(self._print, TABLE_SECONDS))
        self._drivers: set[str] = set()  # the others that were printed
        self._warned = False
        self._before = status.read_if_valid(store)

    def __call__(self, changed: Sequence[Transition]) -> None:
        """Write and print what is due; called after every step of the controller."""
        self._print_drivers(changed)
        self._print_store_warning()
        for report in self._reports:
            report.make_if_due(bool(changed))

    def write(self) -> None:
        """Write `status.json`; prints a warning if the store fails."""
        try:
            status.write(self._store, status.build(self._run, self._controller, self._before))
        except StoreError as error:  # not fatal: tasks may reach the store, and retry for themselves
            self._warn(f"status not written: {error}")

    def _print_drivers(self, changed: Sequence[Transition]) -> None:
        """Print that a task is left to another driver, once for each driver."""
        for transition in changed:
            state = transition.state
            if isinstance(state, MadeElsewhere) and state.driver not in self._drivers:
                self._drivers.add(state.driver)
                task = self._controller.tasks[transition.task_id].full_name
                self._warn(f"{task} is made by {state.driver}: waiting for it; {status.TAKE_OVER_HINT}")

    def _print_store_warning(self) -> None:
        """Print the error of the store when it begins to fail, and when it answers again."""
        warning = self._controller.store_warning
        if bool(warning) != self._warned:
            self._warned = bool(warning)
            self._warn(f"the store fails, and is asked again: {warning}" if warning else "the store answers again")

    def _warn(self, text: str) -> None:
        self._console.print(text, style="yellow", soft_wrap=True)

    def _print(self) -> None:
        self._console.print(render(status.build(self._run, self._controller, self._before)), "", sep="\n")


def connect() -> None:
    """Connect to the cluster of this machine, or to that of `RAY_ADDRESS`; does nothing if connected already.

    Raises `PlacementError` if there is no cluster.
    """
    if ray.is_initialized():
        return
    try:
        # The output of workers stays in their own log files, so that the driver's output is the table alone
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (RayError, OSError, RuntimeError, ValueError) as error:  # no cluster, no token, or no address of Ray
        address = os.environ.get("RAY_ADDRESS")
        place = f"at RAY_ADDRESS={address!r}" if address else "here"
        raise PlacementError(
            f"no Ray cluster answers {place} ({one_line(error)}): start one, or submit this as a job to a cluster"
        ) from None


def stop_on_signals(controller: Controller) -> None:
    """Stop the controller cleanly on SIGTERM (`ray job stop`) and SIGINT (Ctrl-C).

    Must be called after `ray.init`, which installs its own handler of SIGTERM. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        controller.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
