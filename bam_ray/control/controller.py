"""The controller: sees to it that every task gets committed, on nodes that come and go.

`step()` is poll → decide → act. It holds no durable state: a task is finished exactly when its manifest is in the blob
store, and an unfinished one goes on from its own checkpoints there, so a controller that is killed loses nothing and
a second one, given the same recipe, goes on. Two attempts at one task never fight: the launcher begins no second one
while the first may live, and leases in the blob store fence off what neither of them can know.

One failed task stops only those that are made from it.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import MANIFEST, Kind
from bam_ray.control import policies
from bam_ray.control.launcher import Launcher
from bam_ray.control.sightings import Alive, Broke, Done, Sighting, Stopped
from bam_ray.control.states import (
    Blocked,
    Committed,
    Draining,
    Failed,
    History,
    Node,
    Placing,
    Retrying,
    Running,
    State,
    Waiting,
)
from bam_ray.control.tasks import Progress, Task
from bam_ray.errors import PlacementError, StoreUnavailable

Outcome = Literal["running", "finished", "failed", "interrupted"]
OnChange = Callable[[Task, State], None]

DRAIN_PATIENCE = 120.0  # seconds that a task has for its last checkpoint when the run is asked to stop


class Controller:
    """Drives `tasks` (parents first) to their manifests in `store`, by way of `launcher`."""

    def __init__(
        self,
        tasks: Sequence[Task],
        store: BlobStore,
        launcher: Launcher,
        clock: Callable[[], float] = time.monotonic,
        on_change: OnChange | None = None,
    ) -> None:
        self.tasks = {task.id: task for task in tasks}
        self._store = store
        self._launcher = launcher
        self._clock = clock
        self._on_change = on_change
        self._stopping = False
        self._history = {task.id: History() for task in tasks}
        with ThreadPoolExecutor(max_workers=16) as pool:  # one round trip to the store each
            committed = list(pool.map(self._is_committed, tasks))
        self.states: dict[str, State] = {
            task.id: Committed() if done else Waiting() for task, done in zip(tasks, committed, strict=True)
        }

    def stop(self) -> None:
        """Ask all running tasks to write a checkpoint and stop; begin no others. Safe in a signal handler."""
        self._stopping = True

    def step(self) -> bool:
        """Poll, decide, act; returns whether a task changed its kind of state."""
        before = {task_id: type(state) for task_id, state in self.states.items()}
        for task_id, sighting in self._launcher.poll().items():
            self._see(self.tasks[task_id], sighting)
        if self._stopping:
            self._drain()
        else:
            self._place()
        changed = [task_id for task_id, state in self.states.items() if type(state) is not before[task_id]]
        for task_id in changed:
            if self._on_change:
                self._on_change(self.tasks[task_id], self.states[task_id])
        return bool(changed)

    def run(self, pause: float = 1.0, on_step: Callable[[bool], None] | None = None) -> Outcome:
        """Step until nothing more can be done; `on_step` is told each time whether anything changed."""
        while True:
            changed = self.step()
            if on_step:
                on_step(changed)
            if self.outcome() != "running":
                return self.outcome()
            time.sleep(pause)

    def outcome(self) -> Outcome:
        """How the run stands."""
        states = self.states.values()
        if all(isinstance(state, Committed) for state in states):
            return "finished"
        if any(isinstance(state, Placing | Running | Draining) for state in states):
            return "running"
        if self._stopping:
            return "interrupted"
        return "failed" if all(isinstance(state, Committed | Failed | Blocked) for state in states) else "running"

    def attempts(self, task_id: str) -> int:
        """How many attempts at a task this controller has begun."""
        return self._history[task_id].attempts

    def eta(self, task_id: str) -> float | None:
        """Seconds until a running task is done at the speed of its present attempt."""
        state = self.states[task_id]
        if not isinstance(state, Running):
            return None
        done = state.progress.step - state.first_step
        if done <= 0:
            return None
        return (state.progress.total_steps - state.progress.step) * (self._clock() - state.since) / done

    def _is_committed(self, task: Task) -> bool:
        return self._store.exists(f"{task.kind}/{task.id}/{MANIFEST}")

    def _see(self, task: Task, sighting: Sighting) -> None:
        """Move one task according to what the launcher saw of it."""
        match sighting:
            case Alive(node, progress):
                self._see_alive(task, node, progress)
            case Done(node, progress):
                self._see_end(task, Broke(f"{task.kind}/{task.name} ended without a manifest", node, progress))
            case Stopped(node, progress):
                if isinstance(self.states[task.id], Draining):
                    self._launcher.free(task.id)
                    self.states[task.id] = Waiting()
                else:
                    self._see_end(task, Broke("it stopped without having been asked to", node, progress))
            case Broke():
                self._see_end(task, sighting)

    def _see_alive(self, task: Task, node: Node, progress: Progress | None) -> None:
        progress = progress or Progress(0, task.total_steps)
        match self.states[task.id]:
            case Running(since=since, first_step=first_step):
                # Reading a checkpoint back is no work done: the clock starts at the first step that is reported
                known = first_step > 0 or progress.step == 0
                self.states[task.id] = Running(
                    node, progress, since if known else self._clock(), first_step if known else progress.step
                )
            case Draining() as draining:
                self.states[task.id] = replace(draining, node=node, progress=progress)
            case _:
                self.states[task.id] = Running(node, progress, self._clock(), progress.step)

    def _see_end(self, task: Task, broke: Broke) -> None:
        """An attempt is over. If the manifest is there it went well, whatever was seen; `broke` says what else it was.

        A node that was cut off may have committed before it died.
        """
        try:
            committed = self._is_committed(task)
        except StoreUnavailable:
            return  # seen again at the next step
        self._launcher.free(task.id)
        if committed:
            self.states[task.id] = Committed(broke.progress)
            return
        history, state = policies.after_failure(task, self._history[task.id], broke, self._clock())
        self._history[task.id] = history
        self.states[task.id] = state

    def _place(self) -> None:
        """Block what a failure cut off, and place what is ready."""
        now = self._clock()
        ready: list[Task] = []
        pending = 0
        active: Counter[Kind] = Counter()
        for task_id, state in self.states.items():  # parents first, so a block reaches all descendants
            task = self.tasks[task_id]
            if isinstance(state, Placing | Running | Draining):
                active[task.kind] += 1
            match state:
                case Placing():
                    pending += 1
                case Waiting():
                    blocker = self._blocker(task)
                    if blocker:
                        self.states[task_id] = Blocked(blocker)
                    elif all(isinstance(self.states[parent], Committed) for parent in task.parents):
                        ready.append(task)
                case Retrying(not_before=not_before) if now >= not_before:
                    ready.append(task)
        for task in policies.choose(ready, pending, active, self._remaining):
            history = self._history[task.id]
            try:
                self._launcher.place(task, history.avoid)
            except PlacementError as error:
                self.states[task.id] = policies.after_no_place(history, error, now)
            else:
                self._history[task.id] = replace(history, attempts=history.attempts + 1)
                self.states[task.id] = Placing()

    def _blocker(self, task: Task) -> str | None:
        """The failed task that `task` can never be made without."""
        for parent in task.parents:
            state = self.states[parent]
            if isinstance(state, Failed):
                return f"{self.tasks[parent].kind}/{self.tasks[parent].name}"
            if isinstance(state, Blocked):
                return state.by
        return None

    def _drain(self) -> None:
        """Towards a stop: running tasks are told, those on no node yet are forgotten, the deaf are killed."""
        now = self._clock()
        for task_id, state in self.states.items():
            match state:
                case Placing():
                    self._launcher.free(task_id)
                    self.states[task_id] = Waiting()
                case Running(node=node, progress=progress):
                    self._launcher.drain(task_id)
                    self.states[task_id] = Draining(node, progress, now)
                case Draining(since=since) if now - since > DRAIN_PATIENCE:
                    self._launcher.free(task_id)
                    self.states[task_id] = Waiting()

    def _remaining(self, task: Task) -> int:
        state = self.states[task.id]
        return policies.remaining_steps(task, state.progress if isinstance(state, Retrying) else None)
