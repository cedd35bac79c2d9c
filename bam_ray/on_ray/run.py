"""The driver of a run, inside a Ray job or on any machine of the cluster: controller, launcher, status and table.

Nothing durable lives here: killed and submitted again, a run goes on where it stood.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Collection
from types import FrameType

import ray
from rich.console import Console

from bam_ray.blobs import BlobStore
from bam_ray.blobs.check import open_checked_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control import status
from bam_ray.control.controller import Controller, Outcome
from bam_ray.control.status_table import render
from bam_ray.errors import PlacementError, StoreUnavailable
from bam_ray.on_ray.launcher import RayLauncher
from bam_ray.on_ray.work import EngineFactory, StageFunctions
from bam_ray.pipeline.graph import subset, task_graph
from bam_ray.settings import Recipe

STEP_EVERY = 0.5  # seconds
STATUS_EVERY = 2.0
TABLE_EVERY = 30.0  # where nothing changes
TABLE_WIDTH = 110


def run_tasks(
    recipe: Recipe,
    kinds: Collection[ArtifactKind] | None = None,
    engine_factory: EngineFactory | None = None,
    functions: StageFunctions | None = None,
) -> Outcome:
    """Make all artifacts of `kinds` (None: all) and what they are made from; returns how that ended.

    SIGTERM and SIGINT make all running tasks write a checkpoint first. Raises `StoreError` where the blob store cannot
    be used and `PlacementError` where there is no cluster; what goes wrong later is told in the table.
    """
    tasks = task_graph(recipe)
    store, weaker = open_checked_store(recipe.store)  # wrong credentials and a missing bucket are said now
    if weaker:
        Console(width=TABLE_WIDTH).print(weaker, style="yellow", highlight=False, soft_wrap=True)
    connect()
    launcher = RayLauncher(recipe, store, engine_factory, functions)
    controller = Controller(tasks if kinds is None else subset(tasks, kinds), store, launcher)
    stop_on_signals(controller)
    show = Narrator(recipe.name, controller, store)
    try:
        outcome = controller.run(STEP_EVERY, show)
    finally:
        launcher.close()
    show.last()
    return outcome


class Narrator:
    """Writes `status.json`, and prints the table where something changed or a while has passed."""

    def __init__(self, run: str, controller: Controller, store: BlobStore) -> None:
        self._run = run
        self._controller = controller
        self._store = store
        self._console = Console(width=TABLE_WIDTH, file=sys.stdout)
        self._written = self._printed = float("-inf")
        self._before = status.last(store)

    def __call__(self, changed: bool) -> None:
        now = time.monotonic()
        if changed or now - self._written >= STATUS_EVERY:
            self._write()
            self._written = now
        if changed or now - self._printed >= TABLE_EVERY:
            self._print()
            self._printed = now

    def last(self) -> None:
        """The end of the story."""
        self._write()

    def _write(self) -> None:
        try:
            status.write(self._store, status.build(self._run, self._controller, self._before))
        except StoreUnavailable as error:  # tasks may get through; they try for themselves
            self._console.print(f"status not written: {error}", style="yellow", highlight=False)

    def _print(self) -> None:
        self._console.print(render(status.build(self._run, self._controller, self._before)), "", sep="\n")


def connect() -> None:
    """Join the cluster that this process is on, or that `RAY_ADDRESS` names, if it has not been joined yet."""
    if ray.is_initialized():
        return
    try:
        # Workers' output stays in their own logs: one table is the story
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        raise PlacementError("no Ray cluster answers here: start one, or submit this as a job to one") from None


def stop_on_signals(controller: Controller) -> None:
    """SIGTERM (`ray job stop`) and SIGINT (Ctrl-C) ask for a clean stop. After `ray.init`, which takes SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        controller.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
