"""The controller: sees to it that every task gets committed, on nodes that come and go.

`step()` is poll → decide → act. It holds no durable state: a task is finished exactly when its manifest is in the blob
store, and an unfinished one goes on from its own checkpoints there, so a controller that is killed loses nothing and
a second one, given the same recipe, goes on. Two attempts at one task never fight: the launcher begins no second one
while the first may live, and leases in the blob store fence off what neither of them can know.

One failed task stops only those that are made from it.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import MANIFEST, ArtifactKind
from bam_ray.control import policies
from bam_ray.control.launcher import Launcher
from bam_ray.control.observations import Alive, Broke, Done, Queued, Sighting, Stopped
from bam_ray.control.quorum_deadline import Waits
from bam_ray.errors import PlacementError, StoreUnavailable
from bam_ray.pipeline.states import (
    Blocked,
    Committed,
    Draining,
    Ended,
    Failed,
    History,
    Node,
    Placing,
    Retrying,
    Running,
    State,
    Waiting,
)
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling import elastic
from bam_ray.scheduling.cluster_view import Snapshot
from bam_ray.scheduling.feasibility import DemandCheck
from bam_ray.scheduling.placement import Placement
from bam_ray.scheduling.throughput import Group, Speeds

Outcome = Literal["running", "finished", "failed", "interrupted"]
OnChange = Callable[[Task, State], None]

DRAIN_PATIENCE = 120.0  # seconds that a task has for its last checkpoint when the run is asked to stop
MOVE_PATIENCE = 900.0  # and when it is to move: nobody waits for it, and killing it would lose work


@dataclass(frozen=True)
class _Attempt:
    """What was placed: the task with the demand that was taken, and how it is measured."""

    task: Task
    group: Group


class Controller:
    """Drives `tasks` (parents first) to their manifests in `store`, by way of `launcher`."""

    def __init__(
        self,
        tasks: Sequence[Task],
        store: BlobStore,
        launcher: Launcher,
        clock: Callable[[], float] = time.monotonic,
        on_change: OnChange | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.tasks = {task.id: task for task in tasks}
        self.speeds = Speeds()
        self._store = store
        self._launcher = launcher
        self._clock = clock
        self._on_change = on_change
        self._stopping = False
        self._waits = Waits(store, wall)
        self._history = {task.id: History() for task in tasks}
        self._placed: dict[str, _Attempt] = {}  # the last of each task
        self._kinds: dict[str, str] = {}  # of nodes that were ever seen, by id
        self._expected: list[str] = []
        self._demands = DemandCheck(clock())
        with ThreadPoolExecutor(max_workers=16) as pool:  # one round trip to the store each
            committed = list(pool.map(self._is_committed, tasks))
        self.states: dict[str, State] = {
            task.id: Committed() if done else Waiting() for task, done in zip(tasks, committed, strict=True)
        }

    def stop(self) -> None:
        """Ask all running tasks to write a checkpoint and stop; begin no others. Safe in a signal handler."""
        self._stopping = True

    def step(self) -> bool:
        """Poll, decide, act; returns whether a task changed its kind of state.

        Raises `PlacementError` where the cluster could never hold some task: see `demands`.
        """
        before = {task_id: type(state) for task_id, state in self.states.items()}
        nodes = self._launcher.nodes()
        self._kinds.update((node.id, node.kind) for node in nodes or ())
        if nodes and not self._stopping:
            open_tasks = (task for id, task in self.tasks.items() if not isinstance(self.states[id], Committed))
            self._demands.look(open_tasks, nodes, self._clock())
        for task_id, sighting in self._launcher.poll().items():
            self._see(self.tasks[task_id], sighting)
        self._kill_deaf()
        if self._stopping:
            self._drain_all()
        else:
            self._leave_nodes({node.id for node in nodes or () if node.leaving})
            self._call_to_absorb()
            self._give_up_waiting(None if nodes is None else {node.id for node in nodes if not node.leaving})
            self._place(None if nodes is None else Snapshot(nodes))
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
        if all(isinstance(state, Committed) or self._is_spared(id) for id, state in self.states.items()):
            return "finished"
        if any(isinstance(state, Placing | Running | Draining) for state in states):
            return "running"
        if self._stopping:
            return "interrupted"
        return "failed" if all(isinstance(state, Committed | Failed | Blocked) for state in states) else "running"

    def attempts(self, task_id: str) -> int:
        """How many attempts at a task this controller has begun."""
        return self._history[task_id].attempts

    def history(self, task_id: str) -> History:
        """What this controller remembers of a task's attempts."""
        return self._history[task_id]

    def now(self) -> float:
        """The time on the controller's clock, in seconds."""
        return self._clock()

    def eta(self, task_id: str) -> float | None:
        """Seconds until a running task is done, at the speed of this attempt, else at that measured on such nodes."""
        state = self.states[task_id]
        if not isinstance(state, Running):
            return None
        task = self.tasks[task_id]
        speed = state.steps_per_second
        if speed is None and task.step_tokens:
            kind = self._kinds.get(state.node.id, "")
            speed = (self.speeds.measured(self._placed[task_id].group, kind) or 0.0) / task.step_tokens
        return task.remaining_steps(state.progress) / speed if speed else None

    def remaining_steps(self, task_id: str) -> int:
        """Steps still to be done, as far as is known."""
        state = self.states[task_id]
        if isinstance(state, Committed):
            return 0
        progress = None if isinstance(state, Blocked) else state.progress
        return self.tasks[task_id].remaining_steps(progress)

    def _is_spared(self, task_id: str) -> bool:
        """Whether a task failed that others could be, and were, made without."""
        if not isinstance(self.states[task_id], Failed | Blocked):
            return False
        without = [task for task in self.tasks.values() if task.quorum and task_id in dict(task.quorum.branches)]
        made = [isinstance(self.states[task.id], Committed) for task in without]
        return bool(made) and all(made)

    def _is_committed(self, task: Task) -> bool:
        return self._store.exists(f"{task.kind}/{task.id}/{MANIFEST}")

    def _see(self, task: Task, sighting: Sighting) -> None:
        """Move one task according to what the launcher saw of it."""
        match sighting:
            case Queued():
                state = self.states[task.id]
                if isinstance(state, Placing) and state.node_id is None:  # it waits for its turn, which is no start
                    self.states[task.id] = replace(state, since=self._clock())
            case Alive():
                self._see_alive(task, sighting)
            case Done(node, progress):
                self._see_end(task, Broke(f"{task.where} ended without a manifest", node, progress))
            case Stopped(node, progress):
                state = self.states[task.id]
                if isinstance(state, Draining):
                    if state.moving:
                        self.speeds.saw_checkpoint(self._placed[task.id].group, self._clock() - state.since)
                    self._leave(task, node, progress or state.progress, state.cause)
                else:
                    self._see_end(task, Broke("it stopped without having been asked to", node, progress))
            case Broke():
                self._see_end(task, sighting)

    def _see_alive(self, task: Task, alive: Alive) -> None:
        now, node, progress = self._clock(), alive.node, alive.progress
        match self.states[task.id]:
            case Running(first_step=0) as running if progress and progress.step > 0:
                # Reading a checkpoint back is no work done: the clock starts at the first step that is reported
                self.speeds.saw_start(self._placed[task.id].group, now - running.placed)
                self.states[task.id] = Running(node, progress, now, progress.step, now, running.placed, alive.nodes)
            case Running() as running:
                progress = progress or running.progress
                seen = now if progress.step != running.progress.step else running.seen
                running = replace(running, node=node, progress=progress, seen=seen, nodes=alive.nodes)
                self.states[task.id] = running
                if seen == now and running.steps_per_second and node.id in self._kinds:
                    rate = running.steps_per_second * task.step_tokens
                    self.speeds.saw(self._placed[task.id].group, self._kinds[node.id], task.id, rate)
            case Draining() as draining:
                self.states[task.id] = replace(draining, node=node, progress=progress or draining.progress)
            case state:
                assert isinstance(state, Placing), state
                # One that goes on says where it stands only with its next step
                known = progress or state.progress or Progress(0, task.total_steps)
                first = progress.step if progress else 0
                self.states[task.id] = Running(node, known, now, first, now, state.since, alive.nodes)

    def _see_end(self, task: Task, broke: Broke) -> None:
        """An attempt is over. If the manifest is there it went well, whatever was seen; `broke` says what else it was.

        A node that was cut off may have committed before it died.
        """
        try:
            committed = self._is_committed(task)
        except StoreUnavailable:
            return  # seen again at the next step
        self._note_end(task, broke.node, broke.progress, "committed" if committed else broke.error)
        self._launcher.free(task.id)
        if committed:
            self.states[task.id] = Committed(broke.progress)
            return
        history, state = policies.after_failure(task, self._history[task.id], broke, self._clock())
        self._history[task.id] = history
        self.states[task.id] = state

    def _leave(self, task: Task, node: Node | None, progress: Progress | None, cause: str) -> None:
        """End an attempt that nothing was wrong with; the task waits for the next."""
        self._note_end(task, node, progress, cause)
        self._launcher.free(task.id)
        self.states[task.id] = Waiting(progress)

    def _note_end(self, task: Task, node: Node | None, progress: Progress | None, cause: str) -> None:
        state, now = self.states[task.id], self._clock()
        placed = (
            state.since
            if isinstance(state, Placing)
            else state.placed
            if isinstance(state, Running | Draining)
            else now
        )
        ended = Ended(node, placed, now, progress.step if progress else 0, cause)
        history = self._history[task.id]
        self._history[task.id] = replace(history, ended=(*history.ended, ended))

    def _give_up_waiting(self, living: set[str] | None) -> None:
        """Take back what was meant for a node that is gone, or that does not take it."""
        now = self._clock()
        for task_id, state in self.states.items():
            match state:
                case Placing(node_id=str(node_id), since=since) if living is not None and (
                    node_id not in living or now - since > policies.PIN_PATIENCE
                ):
                    self._launcher.free(task_id)
                    self.states[task_id] = Waiting(state.progress)

    def _leave_nodes(self, leaving: set[str]) -> None:
        """Move what trains on nodes that will be taken away, a group if one of its nodes will be, while there is time
        for a checkpoint; what has none to write may get done."""
        for task_id, state in self.states.items():
            if not isinstance(state, Running) or not self.tasks[task_id].total_steps:
                continue
            if leaving & {state.node.id, *state.nodes}:
                self._move(task_id, state)

    def _call_to_absorb(self) -> None:
        """End attempts at mixtures that could begin without branches which have arrived since: the next takes them in.

        What an attempt is made of, and what it could not use, it says itself, once it trains.
        """
        for task_id, state in self.states.items():
            quorum = self.tasks[task_id].quorum
            if quorum and isinstance(state, Running) and state.first_step and state.progress.experts:
                seen = {*state.progress.experts, *state.progress.left_out}
                late = [name for name in policies.arrived(quorum, self.states) if name not in seen]
                if late:
                    self._move(task_id, state, f"to absorb {', '.join(late)}")

    def _move(self, task_id: str, state: Running, cause: str = "moved") -> None:
        """Ask for a checkpoint, to go on elsewhere or with more."""
        self._launcher.drain(task_id)
        self.states[task_id] = Draining(
            state.node, state.progress, self._clock(), state.placed, moving=True, cause=cause
        )

    def _kill_deaf(self) -> None:
        """Free what was asked to stop, and does not."""
        now = self._clock()
        for task_id, state in self.states.items():
            if not isinstance(state, Draining):
                continue
            if now - state.since > (MOVE_PATIENCE if state.moving else DRAIN_PATIENCE):
                self._leave(self.tasks[task_id], state.node, state.progress, "killed: it did not stop")

    def _place(self, snapshot: Snapshot | None) -> None:
        """Block what a failure cut off, and place what is ready."""
        ready = self._ready()
        self._expect(ready)
        apart = [task for task in ready if snapshot and task.trains_alone]
        queued = [task for task in ready if not (snapshot and task.trains_alone)]
        active: Counter[ArtifactKind] = Counter()
        pending = 0
        for task_id, state in self.states.items():
            active[self.tasks[task_id].kind] += isinstance(state, Placing | Running | Draining)
            pending += isinstance(state, Placing) and state.node_id is None
        if snapshot is not None:
            self._give_up_gathering(snapshot)
        for task in policies.choose(queued, pending, active, lambda task: self.remaining_steps(task.id)):
            avoid = self._avoid(task, snapshot)
            if snapshot is None or self._has_room(task, snapshot, avoid):
                self._begin(task, snapshot, avoid)
        if snapshot is None:
            return
        placement = Placement(snapshot, self.speeds, self._clock(), self._kinds)
        for task_id, attempt in self._placed.items():
            state = self.states[task_id]
            if attempt.task.trains_alone and isinstance(state, Placing | Running | Draining):
                placement.add_active(attempt.task, attempt.group, state)
        for task in apart:
            self._add_waiting(task, placement)
        for task_id in placement.to_move():
            state = self.states[task_id]
            assert isinstance(state, Running)
            self._move(task_id, state)
            placement.leaves(task_id)
        for task, node_id, avoid in placement.to_place():
            self._begin(task, snapshot, avoid, node_id)

    def _give_up_gathering(self, snapshot: Snapshot) -> None:
        """Take back groups that wait for ranks on nodes that have died since."""
        now = self._clock()
        for task_id, attempt in self._placed.items():
            match self.states[task_id]:
                case Running(first_step=0) as state if (
                    attempt.task.is_group
                    and now - state.placed > elastic.PATIENCE
                    and not snapshot.can_hold(attempt.task)
                ):
                    self._leave(attempt.task, state.node, state.progress, "nodes died before it began")

    def _avoid(self, task: Task, snapshot: Snapshot | None) -> frozenset[str]:
        """Nodes that `task`, which the launcher places, should not go to now."""
        history = self._history[task.id]
        if snapshot is None or not snapshot.can_hold(task):
            return history.avoid
        needs = snapshot.taken(task).needs
        return snapshot.spared(needs, history.avoid, task.workers, history.would_wait)

    def _has_room(self, task: Task, snapshot: Snapshot, avoid: frozenset[str]) -> bool:
        """Whether all workers of a group fit now; where they do not, what is free is kept for them."""
        if not task.is_group or not snapshot.can_hold(task):
            return True
        needs = snapshot.taken(task).needs
        return all([snapshot.take_any(needs, avoid) for _ in range(task.workers)])

    def _ready(self) -> list[Task]:
        """What can be placed now."""
        ready: list[Task] = []
        now = self._clock()
        for task_id, state in self.states.items():  # parents first, so a block reaches all descendants
            task = self.tasks[task_id]
            match state:
                case Waiting():
                    blocker = self._blocker(task)
                    if blocker:
                        self.states[task_id] = Blocked(blocker)
                    elif self._has_parents(task):
                        ready.append(task)
                case Retrying(not_before=not_before) if now >= not_before:
                    ready.append(task)
        return ready

    def _expect(self, ready: Iterable[Task]) -> None:
        """Tell the launcher what could be worked on, where that has changed."""
        active = (id for id, state in self.states.items() if isinstance(state, Placing | Running | Draining))
        expected = sorted({*active, *(task.id for task in ready)})
        if expected != self._expected:
            self._expected = expected
            self._launcher.expect([self.tasks[task_id] for task_id in expected])

    def _add_waiting(self, task: Task, placement: Placement) -> None:
        state = self.states[task.id]
        progress = state.progress if isinstance(state, Waiting | Retrying) else None
        try:
            placement.add_waiting(task, progress, self._history[task.id])
        except PlacementError as error:
            self.states[task.id] = policies.after_no_place(error, self._clock())

    def _begin(self, task: Task, snapshot: Snapshot | None, avoid: frozenset[str], node_id: str | None = None) -> None:
        """Place one task, with the first of its demands that can be met."""
        now = self._clock()
        state = self.states[task.id]
        progress = state.progress if isinstance(state, Waiting | Retrying) else None
        try:
            if snapshot is None:
                attempt, said = _Attempt(task, (task.model, "")), ""
            else:
                sized = self._sized(task, snapshot)
                taken = snapshot.taken(sized)
                attempt, said = _Attempt(replace(sized, needs=taken.needs), taken.group), taken.said
                if sized.workers < task.workers:
                    said = f"goes on with {sized.workers} of {task.workers} workers"
            self._launcher.place(attempt.task, avoid, node_id)
        except PlacementError as error:
            self.states[task.id] = policies.after_no_place(error, now)
        else:
            self._placed[task.id] = attempt
            history = self._history[task.id]
            self._history[task.id] = replace(history, attempts=history.attempts + 1, said=said)
            self.states[task.id] = Placing(now, node_id, progress)

    def _sized(self, task: Task, snapshot: Snapshot) -> Task:
        """`task`, with fewer workers where nodes could not hold all of them for too long."""
        history, now = self._history[task.id], self._clock()
        since = None if snapshot.can_hold(task) else now if history.no_place_since is None else history.no_place_since
        self._history[task.id] = replace(history, no_place_since=since)
        if since is None or now - since < elastic.PATIENCE:
            return task
        return elastic.shrunk(task, snapshot.can_hold) or task

    def _has_parents(self, task: Task) -> bool:
        """Whether all that `task` is made from is there, or as much as its quorum says."""
        late = dict(task.quorum.branches) if task.quorum else {}
        if not all(isinstance(self.states[parent], Committed) for parent in task.parents if parent not in late):
            return False
        return task.quorum is None or policies.enough(task.quorum, self.states, self._waits.seconds(task, task.quorum))

    def _blocker(self, task: Task) -> str | None:
        """The failed task that `task` can never be made without."""
        late = dict(task.quorum.branches) if task.quorum and policies.can_meet(task.quorum, self.states) else {}
        for parent in task.parents:
            state = self.states[parent]
            if parent in late:
                continue
            if isinstance(state, Failed):
                return self.tasks[parent].where
            if isinstance(state, Blocked):
                return state.by
        return None

    def _drain_all(self) -> None:
        """Towards a stop: running tasks are told, those on no node yet are forgotten."""
        now = self._clock()
        for task_id, state in self.states.items():
            match state:
                case Placing():
                    self._launcher.free(task_id)
                    self.states[task_id] = Waiting(state.progress)
                case Running(node=node, progress=progress, placed=placed):
                    self._launcher.drain(task_id)
                    self.states[task_id] = Draining(node, progress, now, placed)
