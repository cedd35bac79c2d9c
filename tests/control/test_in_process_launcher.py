"""Whole runs of the controller with attempts in threads of this process."""

import threading
import time
from collections.abc import Callable
from typing import cast

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control import policies
from bam_ray.control.controller import Controller
from bam_ray.control.launcher import InProcessLauncher
from bam_ray.errors import DataError, Interrupted, StoreUnavailable
from bam_ray.pipeline.graph import task_graph
from bam_ray.pipeline.states import (
    Blocked,
    Committed,
    Failed,
)
from bam_ray.pipeline.tasks import Progress, StageContext, Task
from tests.support.control.sample_recipe import sample_recipe
from tests.support.control.scripted_launcher import (
    commit_task,
    make_task,
)


def in_threads(
    tasks: list[Task], store: MemoryStore, work: Callable[[Task, StageContext], None], slots: int = 2
) -> Controller:
    """Return a controller that runs `work` on threads."""
    return Controller(tasks, store, InProcessLauncher(lambda placed, context: work(placed.task, context), slots))


def test_threads_run_a_graph_in_parallel() -> None:
    store = MemoryStore()
    together = threading.Barrier(2, timeout=5)

    def work(task: Task, context: StageContext) -> None:
        if task.name in ("b", "c"):
            together.wait()  # passes only if both run at the same time
        context.report(Progress(10, 10, loss=1.0))
        commit_task(store, task)

    controller = in_threads(
        [make_task("a"), make_task("b", "a"), make_task("c", "a"), make_task("d", "b", "c")], store, work
    )
    assert controller.run(pause=0.001) == "finished"
    assert cast(Committed, controller.states["d"]).progress == Progress(10, 10, loss=1.0)


def test_slots_limit_the_running_threads() -> None:
    store = MemoryStore()
    running = 0
    most = 0
    lock = threading.Lock()

    def work(task: Task, context: StageContext) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        commit_task(store, task)

    assert in_threads([make_task(f"t{i}") for i in range(6)], store, work, slots=2).run(pause=0.001) == "finished"
    assert most == 2


def test_a_failed_control_blocks_the_report_but_no_mixture() -> None:
    store = MemoryStore()
    tasks = task_graph(sample_recipe("compare={}"))
    order: list[str] = []

    def work(task: Task, context: StageContext) -> None:
        order.append(task.full_name)
        if task.kind == ArtifactKind.CONTROLS:
            raise DataError("no tokens")
        commit_task(store, task)

    controller = in_threads(tasks, store, work, slots=1)
    assert controller.run(pause=0.001) == "failed"
    states = {controller.tasks[id].full_name: state for id, state in controller.states.items()}
    assert {name for name, state in states.items() if not isinstance(state, Committed)} == {
        "controls/dense",
        "reports/report",
    }
    assert states["reports/report"] == Blocked("controls/dense")
    branches = ["branches/code", "branches/law", "branches/general"]
    assert order[2:6] == [*branches, "controls/dense"], "the control is the longest, but it gives way"


def test_errors_of_threads_have_a_type_and_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "FIRST_DELAY", 0.001)
    started: list[str] = []

    def work(task: Task, context: StageContext) -> None:
        started.append(task.name)
        if task.name == "own":
            raise DataError("corpus is empty")
        raise ZeroDivisionError("by zero")

    controller = in_threads([make_task("own"), make_task("bug", attempts=2)], MemoryStore(), work)
    assert controller.run(pause=0.001) == "failed"
    own, bug = (cast(Failed, controller.states[name]) for name in ("own", "bug"))
    assert own.error == "corpus is empty"
    assert own.log == ()
    assert bug.error == "ZeroDivisionError: by zero (2 attempts)"
    assert any("in work" in line for line in bug.log)
    assert sorted(started) == ["bug", "bug", "own"]


def test_outages_in_threads_are_not_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "FIRST_DELAY", 0.001)
    store, tries = MemoryStore(), 0

    def work(task: Task, context: StageContext) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise StoreUnavailable("the checkpoint of step 4 could not be written: no S3 server answers")
        commit_task(store, task)

    controller = in_threads([make_task("a", attempts=1)], store, work)
    assert controller.run(pause=0.001) == "finished"
    assert (tries, controller.history("a").failures) == (4, 0)


def test_a_stopped_run_resumes_at_its_last_step() -> None:
    store = MemoryStore()
    steps: dict[str, int] = {}  # the checkpoints
    first = threading.Event()

    def work(task: Task, context: StageContext) -> None:
        for step in range(steps.get(task.name, 0), 200):
            if context.should_stop():
                raise Interrupted("stopped")
            steps[task.name] = step + 1
            context.report(Progress(step + 1, 200, checkpoint_step=step + 1))
            if step == 5:
                first.set()
            time.sleep(0.0005)
        commit_task(store, task)

    tasks = [make_task("a", steps=200), make_task("b", "a", steps=200)]
    controller = in_threads(tasks, store, work)

    def stop_when_it_runs() -> None:
        first.wait()
        controller.stop()

    threading.Thread(target=stop_when_it_runs).start()
    assert controller.run(pause=0.001) == "interrupted"
    reached = steps["a"]
    assert 0 < reached < 200
    assert in_threads(tasks, store, work).run(pause=0.001) == "finished"
    assert steps == {"a": 200, "b": 200}
