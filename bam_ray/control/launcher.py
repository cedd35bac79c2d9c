"""The launcher protocol: everything that the controller knows about where and how tasks run.

Every method returns at once. `poll` returns the status of each attempt that was placed and not freed. An attempt that
cannot be reached but is not known to be dead is still `Alive`: a second attempt would make two writers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bam_ray.control.attempt import Attempt
from bam_ray.control.observations import AttemptStatus, Queued
from bam_ray.control.transitions import PlacedTask
from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import StageContext, Task
from bam_ray.scheduling.nodes import NodeFacts


class Launcher(Protocol):
    """The interface to whatever runs attempts at tasks."""

    def nodes(self) -> Sequence[NodeFacts] | None:
        """Return the living nodes with their free resources; None if only the launcher chooses among its nodes."""
        ...

    def expect(self, tasks: Sequence[Task]) -> None:
        """Receive all tasks that can run now, placed or not, so that an autoscaling cluster can grow for them."""
        ...

    def place(self, placed: PlacedTask, avoid: frozenset[str], node_id: str | None = None) -> None:
        """Start an attempt; queue it until there is capacity.

        Args:
            placed: The task, with the resource request that was chosen, and the number of the attempt.
            avoid: Ids of nodes not to start on, if others can hold the task.
            node_id: The node to start on; None lets the launcher choose.
        """
        ...

    def poll(self) -> dict[str, AttemptStatus]:
        """Return the status of every attempt, by task id."""
        ...

    def drain(self, task_id: str) -> None:
        """Ask an attempt to write a checkpoint and stop."""
        ...

    def free(self, task_id: str) -> None:
        """Forget an attempt and release its resources; kill it if it still runs."""
        ...


@dataclass(frozen=True)
class _Entry:
    task: Task
    attempt: Attempt


class InProcessLauncher:
    """A launcher that runs attempts as threads of this process, first come, first served.

    Args:
        run: The function that runs a task.
        slots: The largest number of attempts that run at the same time.
    """

    def __init__(self, run: Callable[[PlacedTask, StageContext], object], slots: int = 1) -> None:
        self._run = run
        self._slots = slots
        self._node = Node("local", "local")
        self._entries: dict[str, _Entry] = {}
        self._queue: list[str] = []

    def nodes(self) -> None:
        """Return None: threads have no nodes to choose from."""
        return None

    def expect(self, tasks: Sequence[Task]) -> None:
        """Do nothing: threads are created on demand."""

    def place(self, placed: PlacedTask, avoid: frozenset[str], node_id: str | None = None) -> None:
        """Queue an attempt, and start it if a slot is free."""
        attempt = Attempt(lambda context: self._run(placed, context), self._node)
        self._entries[placed.task.id] = _Entry(placed.task, attempt)
        self._queue.append(placed.task.id)
        self._start()

    def poll(self) -> dict[str, AttemptStatus]:
        """Start queued attempts, and return the status of every attempt."""
        self._start()
        waiting = set(self._queue)
        return {
            task_id: Queued() if task_id in waiting else entry.attempt.poll()
            for task_id, entry in self._entries.items()
        }

    def drain(self, task_id: str) -> None:
        """Ask an attempt to stop."""
        self._entries[task_id].attempt.drain()

    def free(self, task_id: str) -> None:
        """Forget an attempt. A thread cannot be killed: if it still runs, it is asked to stop."""
        self._entries.pop(task_id).attempt.drain()
        if task_id in self._queue:
            self._queue.remove(task_id)

    def _start(self) -> None:
        busy = sum(entry.attempt.busy for entry in self._entries.values())
        ready: Sequence[str] = self._queue[: max(0, self._slots - busy)]
        self._queue = self._queue[len(ready) :]
        for task_id in ready:
            self._entries[task_id].attempt.start()
