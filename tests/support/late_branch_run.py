"""A run whose mixture starts with one branch and absorbs a second one that arrives late."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.control.controller import Controller
from bam_ray.control.launcher import InProcessLauncher
from bam_ray.control.transitions import PlacedTask
from bam_ray.errors import Interrupted
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.pipeline.tasks import Progress, StageContext, Task
from bam_ray.settings import Recipe
from tests.support.stage_run import TRAINING, RecordingContext, make_artifacts, run_task, small_recipe

# Every setting of `mix` that creates state of an expert or of a branch
MIX = {
    "training": {**TRAINING, "keep_every": 1},
    "expert_parallel": 1,
    "gate": "noisy",
    "dynamic_blend": {"every": 3, "sequences": 8},
}


class LateBranchRun:
    """A run of the branches `code` and `general`, whose mixture `bam` starts when one of them is committed."""

    def __init__(self, folder: Path, store: str = "store", **changes: object) -> None:
        upcycle = {"mixtures": {"bam": {"method": "bam"}}, "when": {"at_least": 1}}
        branch = {"domains": ["code", "general"], "training": TRAINING}
        self.recipe: Recipe = small_recipe(folder, **{"upcycle": upcycle, "mix": MIX, "branch": branch, **changes})
        self.store: BlobStore = open_store(str(folder / store))
        self.mixture = self.task(ArtifactKind.MIXTURES, "bam")

    def task(self, kind: ArtifactKind, name: str) -> Task:
        """Return a task of the run."""
        return find_task(task_graph(self.recipe), kind, name)

    def branch(self, name: str) -> Manifest:
        """Train a branch and return its manifest."""
        return run_task(self.recipe, self.store, ArtifactKind.BRANCHES, name)

    def start(self) -> None:
        """Make everything that the mixture starts from, with the branch `code` alone."""
        make_artifacts(self.recipe, self.store, ("corpora", "seeds"))
        self.branch("code")
        make_artifacts(self.recipe, self.store, ("upcycled",))

    def mix(self, stop_at: int | None = None) -> Manifest | None:
        """Make one attempt at the mixture; return None if it was stopped at step `stop_at`."""
        try:
            return run_task(self.recipe, self.store, ArtifactKind.MIXTURES, "bam", RecordingContext(stop_at))
        except Interrupted:
            return None

    def step(self, name: str) -> Path:
        """Return a folder with the mixture's training checkpoint `name`."""
        return Artifact(self.store, ArtifactKind.MIXTURES, self.mixture.id, "steps", name).fetch()

    def corpus(self) -> Path:
        """Return a folder with the corpus."""
        return Artifact(self.store, ArtifactKind.CORPORA, self.task(ArtifactKind.CORPORA, "corpus").id).fetch()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events called `name` of all attempts at the mixture."""
        logs = [self.store.get(key).decode() for key in self.store.list(f"mixtures/{self.mixture.id}/events/")]
        events = [json.loads(line) for log in logs for line in log.splitlines()]
        return [event for event in events if event["event"] == name]

    def losses(self) -> list[float]:
        """Return the NLL of every step of the committed mixture."""
        curve = json.loads(Artifact(self.store, ArtifactKind.MIXTURES, self.mixture.id).read_file("curve.json"))
        return [point["nll"] for point in curve]


def expert_names(folder: Path) -> list[str]:
    """Return the names of the experts of the mixture in `folder`."""
    names: list[str] = json.loads((folder / "config.json").read_text())["expert_names"]
    return names


class PausingContext:
    """The context of the mixture in a run under a controller.

    The first attempt waits at step 4 until it is asked to stop. The next attempt is slow, so that there is time to ask
    it to stop again by mistake. If it has found the branch damaged and `absorbs` is true, it waits at step 5.
    """

    def __init__(self, context: StageContext, reached: threading.Event, absorbs: bool) -> None:
        self._context, self._reached, self._absorbs = context, reached, absorbs
        self.node = context.node

    def report(self, progress: Progress) -> None:
        """Report to the controller; set the event `reached` at step 4 of the first attempt."""
        self._context.report(progress)
        if progress.step > 4:
            time.sleep(0.1)
        if progress.step == 4 and "general" not in (*progress.experts, *progress.left_out):
            self._reached.set()
            wait_until(self._context.should_stop)
        if progress.step == 5 and progress.damaged and self._absorbs:
            wait_until(self._context.should_stop)

    def should_stop(self) -> bool:
        """Return True if the controller asks the attempt to stop."""
        return self._context.should_stop()


class ControlledRun:
    """A `LateBranchRun` under a real controller, from its start to its end.

    The branch `general` is trained when the mixture is at step 4, and `damage` is called once it is committed. The
    damaged branch is made again while the mixture trains, or after its last step if it is `too_late`.
    """

    def __init__(self, run: LateBranchRun, damage: Callable[[], object] = lambda: None, too_late: bool = False) -> None:
        self._run, self._damage, self._too_late = run, damage, too_late
        self._mixing = threading.Event()
        tasks = [replace(task, max_attempts=1) for task in task_graph(run.recipe)]  # nothing may fail
        controller = Controller(tasks, run.store, InProcessLauncher(self._work, slots=4))
        assert controller.run(pause=0.01) == "finished"
        self.causes = [ended.cause for ended in controller.history(run.mixture.id).past_attempts]

    def _work(self, placed: PlacedTask, context: StageContext) -> None:
        run, task = self._run, placed.task
        if task.kind == "mixtures":
            pausing = PausingContext(context, self._mixing, absorbs=not self._too_late)
            run_task(run.recipe, run.store, task.kind, task.name, pausing)
            return
        if task.name == "general":
            assert self._mixing.wait(60.0), "mixing did not start without it"
        if placed.suspect and self._too_late:
            wait_until(Artifact(run.store, ArtifactKind.MIXTURES, run.mixture.id).is_committed)
        run_task(run.recipe, run.store, task.kind, task.name, context, suspect=placed.suspect)
        if task.name == "general" and not placed.suspect:
            self._damage()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, for at most a minute."""
    end = time.monotonic() + 60.0
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
