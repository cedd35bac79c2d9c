"""`status.json`, its table, and the size of a run."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from rich.console import Console

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.control import status
from bam_ray.control.controller import Controller
from bam_ray.control.observations import Alive, AttemptStatus, Crashed
from bam_ray.control.status_table import SILENCE, headline, render, render_history
from bam_ray.control.storage import stored_bytes
from bam_ray.control.transitions import PlacedTask
from bam_ray.errors import StoreError
from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.nodes import NodeFacts
from bam_ray.settings import Needs


class CrashingLauncher:
    """A launcher whose attempts all crash."""

    def __init__(self) -> None:
        self.placed: list[str] = []

    def nodes(self) -> list[NodeFacts] | None:
        return None

    def expect(self, tasks: Sequence[Task]) -> None:
        pass

    def place(self, placed: PlacedTask, avoid: frozenset[str], node_id: str | None = None) -> None:
        self.placed.append(placed.task.id)

    def poll(self) -> dict[str, AttemptStatus]:
        crashed = Crashed(
            "loss is NaN", Node("1", "127.0.0.7"), Progress(3, 9, 5.25, 1234.0, 2), ("last words",), final=True
        )
        return dict.fromkeys(self.placed, crashed)

    def drain(self, task_id: str) -> None:
        raise AssertionError

    def free(self, task_id: str) -> None:
        self.placed.remove(task_id)


@pytest.fixture
def failed_run() -> status.Status:
    tasks = [
        Task(ArtifactKind.BRANCHES, "law", "law-1", (), Needs(), total_steps=9),
        Task(ArtifactKind.UPCYCLED, "bam", "bam-1", ("law-1",), Needs()),
    ]
    controller = Controller(tasks, MemoryStore(), CrashingLauncher())
    controller.run(pause=0.0)
    return status.build("demo", controller)


def render_text(shown: status.Status) -> str:
    """Return the table as the terminal shows it, 110 columns wide."""
    console = Console(width=110)
    with console.capture() as capture:
        console.print(render(shown))
    return capture.get()


def test_rows_show_the_state_of_each_task(failed_run: status.Status) -> None:
    law, bam = failed_run.rows
    assert failed_run.state == "failed"
    assert (law.state, law.node, law.step, law.total_steps, law.loss) == ("failed", "127.0.0.7", 3, 9, 5.25)
    assert (law.checkpoint_step, law.attempt, law.error, law.log) == (2, 1, "loss is NaN", ("last words",))
    assert (bam.state, bam.note) == ("blocked", "branches/law failed")


def test_status_is_read_as_it_was_written(failed_run: status.Status) -> None:
    store = MemoryStore()
    assert status.read(store) is None
    status.write(store, failed_run)
    assert status.read(store) == failed_run


def test_a_damaged_status_is_reported_in_one_line() -> None:
    store = MemoryStore("torn")
    store.put(status.STATUS, b"{")
    with pytest.raises(StoreError, match=r"memory://torn/status.json is not a valid status \("):
        status.read(store)


def test_the_table_is_narrow_and_ends_with_the_errors(failed_run: status.Status) -> None:
    lines = render_text(failed_run).splitlines()
    assert lines[0] == "demo: failed, 0 of 2 committed"
    assert lines[2].split() == ["branches", "law", "failed", "127.0.0.7", "3/9", "5.250", "2"]
    assert lines[-3:] == [
        "branches/law on 127.0.0.7: loss is NaN",
        "    last words",
        "upcycled/bam: branches/law failed",
    ]
    assert max(map(len, lines)) <= 110


def test_a_silent_coordinator_is_reported(failed_run: status.Status) -> None:
    running = failed_run.model_copy(update={"state": "running"})
    assert "no update" not in headline(running, running.updated + SILENCE)
    silent = headline(running, running.updated + timedelta(seconds=60))
    assert "no update for 1m 00s" in silent
    assert "memory ran out, submit the run again to continue it" in silent
    assert "\n" not in silent


def test_a_new_coordinator_keeps_the_attempts_of_the_last(failed_run: status.Status) -> None:
    tasks = [Task(ArtifactKind.BRANCHES, "law", "law-1", (), Needs(), total_steps=9)]
    controller = Controller(tasks, MemoryStore(), CrashingLauncher())
    controller.run(pause=0.0)
    again = status.build("demo", controller, failed_run)
    assert [past.cause for past in again.rows[0].past] == ["loss is NaN", "loss is NaN"]
    console = Console(width=110)
    with console.capture() as capture:
        console.print(render_history(again))
    lines = capture.get().splitlines()
    assert lines[1].split() == ["task", "node", "started", "duration", "step", "cause", "of", "end"]
    assert [line.split()[:2] + line.split()[-4:] for line in lines[2:]] == [
        ["branches/law", "127.0.0.7", "3", "loss", "is", "NaN"]
    ] * 2


def test_stage_eta_follows_from_remaining_steps_and_speeds() -> None:
    tasks = [Task(ArtifactKind.BRANCHES, f"b{i}", f"b{i}", (), Needs(), total_steps=100) for i in range(3)]
    launcher = CrashingLauncher()
    now = [0.0]
    controller = Controller(tasks, MemoryStore(), launcher, clock=lambda: now[0])
    controller.step()
    for now[0], step in ((1.0, None), (2.0, 10), (12.0, 30)):
        progress = Progress(step, 100) if step else None
        seen = {"b0": Alive(Node("1", "one"), progress), "b1": Alive(Node("2", "two"), progress)}
        launcher.poll = lambda seen=seen: seen  # type: ignore[method-assign, misc]
        controller.step()
    shown = status.build("demo", controller)
    assert shown.eta_kind == "branches"
    assert shown.eta_seconds == pytest.approx((70 + 70 + 100) / 4)  # two nodes with two steps per second each
    assert headline(shown).endswith(", branches done in 1m 00s")


@pytest.mark.parametrize("said", [None, 240.0])
def test_a_task_without_known_steps_has_the_eta_of_its_stage(said: float | None) -> None:
    launcher = CrashingLauncher()
    controller = Controller([Task(ArtifactKind.UPCYCLED, "bam", "bam", (), Needs())], MemoryStore(), launcher)
    controller.step()
    for step in (1, 2, 3):
        progress = Progress(step, 30, note="layers whose routers are fitted to text", eta_seconds=said)
        seen = {"bam": Alive(Node("1", "one"), progress)}
        launcher.poll = lambda seen=seen: seen  # type: ignore[method-assign, misc]
        controller.step()
    row = status.build("demo", controller).rows[0]
    assert (row.step, row.total_steps, row.note) == (3, 30, "layers whose routers are fitted to text")
    assert row.eta_seconds == said, "it is not 0 because the steps are unknown before the task runs"


def test_stored_bytes_follow_from_manifests(tmp_path: Path) -> None:
    store = MemoryStore()
    (tmp_path / "weights").write_bytes(b"x" * 1000)
    for kind, below in (("branches", ()), ("branches", ("steps", "0001-00000005")), ("seeds", ())):
        artifact = Artifact(store, kind, "one-1", *below)  # type: ignore[arg-type]
        artifact.publish(tmp_path, Manifest(id="one-1", kind=kind, name="one"))  # type: ignore[arg-type]
    store.put("branches/one-1/half-uploaded", b"y" * 5000)
    stored = stored_bytes(store)
    written = sum(store.size(key) for key in store.list()) - 5000
    assert sum(stored.values()) == written
    assert stored["branches"] > 2000 > stored["seeds"] > 1000
