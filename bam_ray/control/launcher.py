"""The launcher protocol: all that the controller knows of where and how tasks run.

Every method returns at once. `poll` says what is seen of each attempt that was placed and not yet freed; an attempt
that cannot be reached, but is not known to be dead either, is still `Alive`: to begin another would make two writers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bam_ray.control.attempt import Attempt
from bam_ray.control.observations import Queued, Sighting
from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import StageContext, Task
from bam_ray.scheduling.nodes import NodeFacts


class Launcher(Protocol):
    """Runs attempts at tasks."""

    def nodes(self) -> Sequence[NodeFacts] | None:
        """The living nodes, and what of them is free; None where the launcher alone chooses among its own."""
        ...

    def expect(self, tasks: Sequence[Task]) -> None:
        """Hear which tasks can be worked on by now, placed or not: a cluster that grows on demand grows for them."""
        ...

    def place(self, task: Task, avoid: frozenset[str], node_id: str | None = None) -> None:
        """Begin an attempt, on the node `node_id`, or (None) on one that is not in `avoid`, where others will do.

        Where there is no room it is begun when there is.
        """
        ...

    def poll(self) -> dict[str, Sighting]:
        """What is seen of every attempt, by task id."""
        ...

    def drain(self, task_id: str) -> None:
        """Ask an attempt to write a checkpoint and stop."""
        ...

    def free(self, task_id: str) -> None:
        """Forget an attempt and give back what it holds, killing it where it still runs."""
        ...


@dataclass(frozen=True)
class _Entry:
    task: Task
    attempt: Attempt


class InProcessLauncher:
    """Attempts as threads of this process, at most `slots` at a time, first come first served."""

    def __init__(self, run: Callable[[Task, StageContext], object], slots: int = 1) -> None:
        self._run = run
        self._slots = slots
        self._node = Node("local", "local")
        self._entries: dict[str, _Entry] = {}
        self._queue: list[str] = []

    def nodes(self) -> None:
        return None

    def expect(self, tasks: Sequence[Task]) -> None:
        """Threads are there as they are wanted."""

    def place(self, task: Task, avoid: frozenset[str], node_id: str | None = None) -> None:
        attempt = Attempt(lambda context: self._run(task, context), self._node)
        self._entries[task.id] = _Entry(task, attempt)
        self._queue.append(task.id)
        self._start()

    def poll(self) -> dict[str, Sighting]:
        self._start()
        waiting = set(self._queue)
        return {
            task_id: Queued() if task_id in waiting else entry.attempt.look()
            for task_id, entry in self._entries.items()
        }

    def drain(self, task_id: str) -> None:
        self._entries[task_id].attempt.drain()

    def free(self, task_id: str) -> None:
        """Threads cannot be killed: one that still runs is asked to stop, and forgotten."""
        self._entries.pop(task_id).attempt.drain()
        if task_id in self._queue:
            self._queue.remove(task_id)

    def _start(self) -> None:
        busy = sum(entry.attempt.busy for entry in self._entries.values())
        ready: Sequence[str] = self._queue[: max(0, self._slots - busy)]
        self._queue = self._queue[len(ready) :]
        for task_id in ready:
            self._entries[task_id].attempt.start()
