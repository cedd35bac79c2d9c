"""The status of a run explains why a task waits for another driver, hangs or is made again, and stays small."""

import pytest
from rich.console import Console

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.leases import AttemptNumber, Lease
from bam_ray.control import policies, status
from bam_ray.control.controller import Controller
from bam_ray.control.drivers import DriverRegistry
from bam_ray.control.observations import Alive, Crashed
from bam_ray.control.status_table import MOST_ROWS, render
from bam_ray.pipeline.drain_policies import DrainRequest
from bam_ray.pipeline.states import MOST_PAST_ATTEMPTS, AttemptRecord, Draining, Failed, History, Running
from bam_ray.pipeline.tasks import Progress
from tests.support.control.scripted_launcher import (
    NODE,
    ControllerHarness,
    ScriptedLauncher,
    commit_task,
    make_measurable_task,
    make_task,
)


def rows(controller: Controller, previous: status.Status | None = None) -> dict[str, status.TaskRow]:
    return {row.id: row for row in status.build("demo", controller, previous).rows}


def test_the_status_names_the_driver_that_makes_a_task() -> None:
    store = MemoryStore()
    other = DriverRegistry(store, "another run")
    Lease.take(store, "branches/a", AttemptNumber(other.epoch, 1))
    registry = DriverRegistry(store, "demo")
    controller = Controller([make_task("a")], store, ScriptedLauncher(), drivers=registry)
    controller.step()
    row = rows(controller)["a"]
    assert row.state == "elsewhere"
    assert row.note.startswith("made by the driver of another run on ")
    assert row.note.endswith("; if that driver is gone, submit with --take-over")


def test_a_silent_attempt_is_reported_before_it_is_replaced() -> None:
    harness = ControllerHarness(make_measurable_task("a"))
    harness.step()
    for harness.now, step in ((1.0, 1), (2.0, 2)):
        harness.step(a=Alive(NODE, Progress(step, 100, note="fast")))
    for harness.now, note in ((2.0 + policies.HANG_TIMEOUT, "fast"), (1202.0, None)):
        harness.step()
        expected = note or "fast; no sign of progress for 20m 00s; it is replaced after 30m 00s"
        assert rows(harness.controller)["a"].note == expected
    harness.now = 3.0 + 2 * policies.HANG_TIMEOUT
    harness.step()
    assert not isinstance(harness.controller.states["a"], Running)
    assert "no sign of progress for 30m" in (rows(harness.controller)["a"].error or "")


def test_a_task_that_is_made_again_says_why() -> None:
    parent, reader = make_task("a"), make_task("b", "a")
    harness = ControllerHarness(parent, reader, committed=("a",))
    harness.step()
    harness.step(b=Crashed("a/model.safetensors does not match", NODE, damaged="a"))
    why = "branches/b found its files damaged; they are checked, and made again if they are"
    assert rows(harness.controller)["a"].note == why
    harness.now += 10.0
    harness.step()
    harness.step(a=Alive(NODE, Progress(1, 10, note="fast")))
    assert rows(harness.controller)["a"].note == f"{why}; fast"


def test_the_past_attempts_of_a_task_are_limited() -> None:
    history = History()
    for step in range(50):
        history = history.with_past_attempt(AttemptRecord(NODE, 0.0, 1.0, step, "node one died"))
    assert [past.step for past in history.past_attempts] == list(range(50 - MOST_PAST_ATTEMPTS, 50))
    harness = ControllerHarness(make_task("a", attempts=100))
    for attempt in range(30):
        harness.step()
        harness.step(a=Crashed(f"crash {attempt}", NODE))
        harness.now += 100.0
    before = status.build("demo", harness.controller)
    assert [past.cause for past in before.rows[0].past] == [f"crash {attempt}" for attempt in range(10, 30)]
    again = ControllerHarness(make_task("a"))
    again.step()
    again.step(a=Crashed("crash 30", NODE))
    past = rows(again.controller, before)["a"].past
    assert [each.cause for each in past] == [f"crash {attempt}" for attempt in range(11, 31)]


def test_the_status_of_a_large_run_is_bounded() -> None:
    names = [f"b{number}" for number in range(5000)]
    store = MemoryStore()
    for name in names[:4000]:
        commit_task(store, make_task(name))
    controller = Controller([make_task(name) for name in names], store, ScriptedLauncher())
    built = status.build("demo", controller)
    attempt = status.PastAttempt(node="one", began=built.updated, seconds=1.0, step=3, cause="moved")
    rows = tuple(row.model_copy(update={"past": (attempt,) * MOST_PAST_ATTEMPTS}) for row in built.rows)
    again = status.build("demo", controller, built.model_copy(update={"rows": rows}))
    assert sum(len(row.past) for row in again.rows) <= status.MOST_PAST_IN_RUN


def test_the_table_of_a_large_run_shows_what_is_active() -> None:
    harness = ControllerHarness(*(make_task(f"b{number}") for number in range(MOST_ROWS + 100)))
    harness.step()
    shown = status.build("demo", harness.controller)
    changes = {0: "committed", MOST_ROWS + 50: "failed"}
    shown = shown.model_copy(
        update={
            "rows": tuple(
                row.model_copy(update={"state": changes.get(number, "waiting"), "error": None})
                for number, row in enumerate(shown.rows)
            )
        }
    )
    console = Console(width=110)
    with console.capture() as capture:
        console.print(render(shown))
    lines = capture.get().splitlines()
    assert len(lines) == MOST_ROWS + 3
    assert any(line.split()[:3] == ["branches", f"b{MOST_ROWS + 50}", "failed"] for line in lines)
    assert lines[-1] == "and 100 waiting"


@pytest.mark.parametrize("advances", [False, True])
def test_a_task_that_never_stops_to_move_fails_in_the_end(advances: bool) -> None:
    task = make_task("a", attempts=2)
    harness = ControllerHarness(task)
    harness.controller = Controller(
        [task],
        harness.store,
        harness.launcher,
        clock=lambda: harness.now,
        drain_policies=[lambda tasks, states: [DrainRequest("a", "moved")]],
    )
    for attempt in range(policies.FREE_KILLS + 2):
        harness.now += 200.0
        harness.step()
        checkpoint = attempt + 1 if advances else None
        harness.step(a=Alive(NODE, Progress(attempt + 1, 10, checkpoint_step=checkpoint)))
        assert isinstance(harness.controller.states["a"], Draining)
        harness.now += policies.MOVE_TIMEOUT + 1.0
        harness.step(a=Alive(NODE, Progress(attempt + 1, 10, checkpoint_step=checkpoint)))
    state = harness.controller.states["a"]
    assert isinstance(state, Failed) is not advances
    if isinstance(state, Failed):
        assert state.error == "killed: it did not stop in time (5 attempts)"
