"""What people are shown of a run."""

from collections.abc import Sequence
from datetime import timedelta

import pytest
from rich.console import Console

from bam_ray.blobs.memory import MemoryStore
from bam_ray.control import status
from bam_ray.control.controller import Controller
from bam_ray.control.nodes import NodeFacts
from bam_ray.control.sightings import Broke, Sighting
from bam_ray.control.states import Node
from bam_ray.control.table import SILENCE, duration, headline, render
from bam_ray.control.tasks import Progress, Task
from bam_ray.errors import StoreError
from bam_ray.settings import Needs


class Broken:
    """A launcher on which every attempt ends badly."""

    def __init__(self) -> None:
        self.placed: list[str] = []

    def nodes(self) -> list[NodeFacts] | None:
        return None

    def expect(self, tasks: Sequence[Task]) -> None:
        pass

    def place(self, task: Task, avoid: frozenset[str], node_id: str | None = None) -> None:
        self.placed.append(task.id)

    def poll(self) -> dict[str, Sighting]:
        broke = Broke(
            "loss is NaN", Node("1", "127.0.0.7"), Progress(3, 9, 5.25, 1234.0, 2), ("last words",), final=True
        )
        return dict.fromkeys(self.placed, broke)

    def drain(self, task_id: str) -> None:
        raise AssertionError

    def free(self, task_id: str) -> None:
        self.placed.remove(task_id)


@pytest.fixture
def failed() -> status.Status:
    tasks = [
        Task("branches", "law", "law-1", (), Needs(), total_steps=9),
        Task("upcycled", "bam", "bam-1", ("law-1",), Needs()),
    ]
    controller = Controller(tasks, MemoryStore(), Broken())
    controller.run(pause=0.0)
    return status.build("demo", controller)


def text(shown: status.Status) -> str:
    console = Console(width=110)
    with console.capture() as capture:
        console.print(render(shown))
    return capture.get()


def test_rows_say_what_happened(failed: status.Status) -> None:
    law, bam = failed.rows
    assert failed.state == "failed"
    assert (law.state, law.node, law.step, law.total_steps, law.loss) == ("failed", "127.0.0.7", 3, 9, 5.25)
    assert (law.checkpoint_step, law.attempt, law.error, law.log) == (2, 1, "loss is NaN", ("last words",))
    assert (bam.state, bam.note) == ("blocked", "branches/law failed")


def test_what_is_written_is_read(failed: status.Status) -> None:
    store = MemoryStore()
    assert status.read(store) is None
    status.write(store, failed)
    assert status.read(store) == failed


def test_a_damaged_status_is_said_in_one_line() -> None:
    store = MemoryStore("torn")
    store.put(status.STATUS, b"{")
    with pytest.raises(StoreError, match=r"memory://torn/status.json is no status"):
        status.read(store)


def test_the_table_fits_and_ends_with_the_errors(failed: status.Status) -> None:
    lines = text(failed).splitlines()
    assert lines[0] == "demo: failed, 0 of 2 committed"
    assert lines[2].split() == ["branches", "law", "failed", "127.0.0.7", "3/9", "5.250", "2"]
    assert lines[-3:] == [
        "branches/law on 127.0.0.7: loss is NaN",
        "    last words",
        "upcycled/bam: branches/law failed",
    ]
    assert max(map(len, lines)) <= 110


def test_a_silent_coordinator_is_noticed(failed: status.Status) -> None:
    running = failed.model_copy(update={"state": "running"})
    assert "nothing heard" not in headline(running, running.updated + SILENCE)
    assert "nothing heard for 1m 00s" in headline(running, running.updated + timedelta(seconds=60))


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, ""), (0.4, "0s"), (59.9, "59s"), (190, "3m 10s"), (7500, "2h 05m"), (3.2 * 86400, "3d 4h")],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown
