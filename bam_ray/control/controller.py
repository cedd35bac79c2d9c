"""The controller: it gets every task committed, on nodes that come and go.

`step()` polls the launcher, decides, and applies. Every decision is a `Transition`, and `_apply` is the only code that
changes a task's state, its history, or calls the launcher for it. The controller holds no durable state: a task is
finished if and only if its manifest is in the blob store, and an unfinished task resumes from its own checkpoints
there. A controller that is killed loses nothing, and another one with the same recipe continues.

Two attempts at one task never run together: the launcher starts no second attempt while the first may be alive, and
leases in the blob store fence off a writer that neither of them knows about. If several drivers share a store, each
task is left to the driver that has started it (see `drivers`).

A failed task stops only the tasks that are made from it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import ManifestGeneration
from bam_ray.control import decisions, policies, tracking
from bam_ray.control.drivers import Drivers, LoneDriver
from bam_ray.control.launcher import Launcher
from bam_ray.control.observations import Alive, AttemptStatus, Queued, Stopped
from bam_ray.control.quorum_deadline import QuorumDeadlines
from bam_ray.control.store_watch import StoreWatch
from bam_ray.control.transitions import Drain, Free, Launch, PlacedTask, Transition
from bam_ray.pipeline import readiness
from bam_ray.pipeline.drain_policies import DRAIN_POLICIES, DrainPolicy
from bam_ray.pipeline.states import (
    Blocked,
    Committed,
    Draining,
    Failed,
    History,
    MadeElsewhere,
    Placing,
    Retrying,
    Running,
    State,
    Waiting,
)
from bam_ray.pipeline.tasks import BranchQuorum, Task
from bam_ray.scheduling.cluster_view import ClusterView
from bam_ray.scheduling.feasibility import FeasibilityCheck
from bam_ray.scheduling.nodes import NodeFacts
from bam_ray.scheduling.placement import ActiveTask, ReadyTask, plan_placement
from bam_ray.scheduling.throughput import ThroughputTracker

RunOutcome = Literal["running", "finished", "failed", "interrupted"]


class Controller:
    """The controller of a run, which works on tasks until their manifests are in the blob store.

    Args:
        tasks: The tasks, parents first.
        store: The blob store of the run.
        launcher: Runs the attempts.
        clock: Returns the time in seconds, from any origin.
        wall: Returns the wall-clock time in seconds since 1970.
        drain_policies: Rules that end running attempts early.
        drivers: This driver and the others of the store; by default it is the only one.

    Attributes:
        hang_timeout: Seconds without a sign of life after which an attempt is reported; twice that, it is replaced.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        store: BlobStore,
        launcher: Launcher,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        drain_policies: Sequence[DrainPolicy] = DRAIN_POLICIES,
        drivers: Drivers | None = None,
    ) -> None:
        self.tasks = {task.id: task for task in tasks}
        self.throughput = ThroughputTracker()
        self._drivers = drivers or LoneDriver()
        self.hang_timeout = policies.HANG_TIMEOUT
        self._watch = StoreWatch(store, self._drivers, clock)
        self._launcher = launcher
        self._clock = clock
        self._drain_policies = drain_policies
        self._stopping = False
        self._deadlines = QuorumDeadlines(store, wall)
        self._history = {task.id: History() for task in tasks}
        self._placed: dict[str, PlacedTask] = {}  # of the last attempt at each task
        self._kinds: dict[str, str] = {}  # of all nodes that were ever seen, by id
        self._expected: list[str] = []
        self._feasibility = FeasibilityCheck(clock())
        self.states: dict[str, State] = {
            task_id: Committed(generation=stored.number) if stored is not None and stored.committed else Waiting()
            for task_id, stored in self._watch.generations(tasks).items()
        }

    def stop(self) -> None:
        """Ask all running tasks to write a checkpoint and stop, and start no others. Safe in a signal handler."""
        self._stopping = True

    def step(self) -> list[Transition]:
        """Poll the launcher, decide and apply.

        Returns:
            The transitions that changed the kind of a task's state, in the order in which they were applied.

        Raises:
            PlacementError: The cluster can never hold one of the tasks; see `scheduling.feasibility`.
            StoreError: The store has failed for minutes.
        """
        nodes = self._launcher.nodes()
        self._kinds.update((node.id, node.kind) for node in nodes or ())
        if nodes and not self._stopping:
            self._check_feasibility(nodes)
        statuses = self._launcher.poll()
        now = self._clock()
        applied = self._apply_all(self._observe(statuses, now))
        applied += self._apply_all(decisions.kill_unresponsive(self.tasks, self.states, self._history, now))
        applied += self._apply_all(
            decisions.replace_hung(self.tasks, self.states, self._history, self.hang_timeout, now)
        )
        if self._stopping:
            return applied + self._apply_all(decisions.shut_down(self.states, now))
        applied += self._apply_all(self._improve(nodes, now))
        applied += self._apply_all(self._leave_to_others())
        applied += self._apply_all(self._place(nodes, now))
        making = (self.tasks[id] for id, state in self.states.items() if state.is_active)
        self._drivers.announce([f"{task.kind}/{task.id}" for task in making])
        return applied

    def run(self, pause: float = 1.0, on_step: Callable[[Sequence[Transition]], None] | None = None) -> RunOutcome:
        """Step until nothing more can be done.

        Args:
            pause: Seconds between steps.
            on_step: Called after each step with its transitions.
        """
        while True:
            transitions = self.step()
            if on_step:
                on_step(transitions)
            if self.outcome() != "running":
                return self.outcome()
            time.sleep(pause)

    def outcome(self) -> RunOutcome:
        """Return whether the run is over, and how it ended."""
        states = self.states.values()
        if all(
            isinstance(state, Committed) or readiness.is_optional_failure(id, self.tasks, self.states)
            for id, state in self.states.items()
        ):
            return "finished"
        if any(state.is_active for state in states):
            return "running"
        if self._stopping:
            return "interrupted"
        return "failed" if all(state.is_final for state in states) else "running"

    def attempts(self, task_id: str) -> int:
        """Return how many attempts at a task this controller has started."""
        return self._history[task_id].attempts

    def history(self, task_id: str) -> History:
        """Return the attempts at a task that this controller has started."""
        return self._history[task_id]

    def now(self) -> float:
        """Return the time on the controller's clock, in seconds."""
        return self._clock()

    def eta(self, task_id: str) -> float | None:
        """Return the seconds until a running task is done; None if its speed is unknown.

        The speed is that of this attempt, or else the one measured for such tasks on nodes of the same kind.
        """
        state = self.states[task_id]
        if not isinstance(state, Running):
            return None
        task = self.tasks[task_id]
        speed = state.steps_per_second
        if speed is None and task.step_tokens:
            kind = self._kinds.get(state.node.id, "")
            speed = (self.throughput.rate(self._placed[task_id].group, kind) or 0.0) / task.step_tokens
        return task.remaining_steps(state.progress) / speed if speed else None

    def remaining_steps(self, task_id: str) -> int:
        """Return the number of steps that are left, as far as is known."""
        state = self.states[task_id]
        return 0 if isinstance(state, Committed) else self.tasks[task_id].remaining_steps(state.progress)

    def _apply_all(self, transitions: Iterable[Transition]) -> list[Transition]:
        """Apply transitions one by one, each before the next is decided; return those that change a kind of state."""
        applied = []
        for transition in transitions:
            self._apply(transition)
            if transition.changes_label:
                applied.append(transition)
        return applied

    def _apply(self, transition: Transition) -> None:
        """Perform one transition. Nothing else changes a task's state or history, or calls the launcher for it."""
        task_id = transition.task_id
        match transition.action:
            case Launch(placed, avoid, node_id):
                self._launcher.place(placed, avoid, node_id)
                self._placed[task_id] = placed
            case Drain():
                self._launcher.drain(task_id)
            case Free():
                self._launcher.free(task_id)
        if transition.history is not None:
            self._history[task_id] = transition.history
        self.states[task_id] = transition.state

    def _observe(self, statuses: Mapping[str, AttemptStatus], now: float) -> Iterator[Transition]:
        """Decide what follows from the launcher's reports, and record the speeds that they show."""
        ended = [self.tasks[id] for id, status in statuses.items() if not isinstance(status, Queued | Alive)]
        stored = self._watch.generations(ended)
        for task_id, status in statuses.items():
            transition = self._after_report(self.tasks[task_id], status, stored.get(task_id), now)
            if transition is not None:
                yield from decisions.make_again(self.tasks[task_id], status, self.states, self._history)
                tracking.record_throughput(self.throughput, self._placed[task_id], transition, self._kinds, now)
                yield transition

    def _after_report(
        self, task: Task, status: AttemptStatus, stored: ManifestGeneration | None, now: float
    ) -> Transition | None:
        state, history = self.states[task.id], self._history[task.id]
        if isinstance(status, Queued | Alive):
            return tracking.while_active(task, state, status, now)
        if isinstance(status, Stopped) and isinstance(state, Draining):
            return tracking.after_stop(task.id, state, history, status, now)
        if stored is None:  # the store does not say; the launcher reports the end again at the next step
            return None
        return tracking.after_end(task, state, history, status, stored.number if stored.committed else None, now)

    def silence_limit(self, task_id: str, state: Running) -> float:
        """Return the seconds without a sign of life after which an attempt counts as hung; see `policies`."""
        return policies.silence_limit(self.tasks[task_id], state, self.hang_timeout)

    @property
    def store_warning(self) -> str:
        """The error of the store, while it does not answer the controller; empty otherwise."""
        return self._watch.warning

    def _leave_to_others(self) -> Iterator[Transition]:
        """Leave the tasks alone that another driver makes, until it has made them or is gone."""
        self._watch.ask(self._drivers.refresh)
        given_up = (self.tasks[id] for id, state in self.states.items() if isinstance(state, Failed | Blocked))
        self._drivers.give_up([f"{task.kind}/{task.id}" for task in given_up])
        waiting = (self.tasks[id] for id, state in self.states.items() if isinstance(state, MadeElsewhere))
        yield from self._look(waiting)
        if self._drivers.has_company:  # what others have just committed may have made further tasks ready
            ready = [self.tasks[id] for id, state in self.states.items() if isinstance(state, Waiting)]
            # A suspect task is committed, but an attempt must check its files
            yield from self._look(
                task for task in ready if self._can_start(task) and not self._history[task.id].suspect
            )

    def _look(self, tasks: Iterable[Task]) -> Iterator[Transition]:
        """Follow what other drivers have done with tasks."""
        for task_id, seen in self._watch.look_for_others(tasks).items():
            yield from decisions.leave_to_other(task_id, self.states[task_id], seen)

    def _check_feasibility(self, nodes: Sequence[NodeFacts]) -> None:
        open_tasks = (task for id, task in self.tasks.items() if not isinstance(self.states[id], Committed))
        self._feasibility.check(open_tasks, nodes, self._clock())

    def _improve(self, nodes: Sequence[NodeFacts] | None, now: float) -> Iterator[Transition]:
        """End attempts that should continue elsewhere or with more, and withdraw those that no node starts."""
        if nodes is not None:
            leaving = {node.id for node in nodes if node.leaving}
            yield from decisions.leave_nodes(self.tasks, self.states, leaving, now)
        for policy in self._drain_policies:
            yield from decisions.drain_by_policy(policy, self.tasks, self.states, now)
        if nodes is not None:
            living = {node.id for node in nodes if not node.leaving}
            yield from decisions.withdraw_untaken(self.states, living, now)

    def _place(self, nodes: Sequence[NodeFacts] | None, now: float) -> Iterator[Transition]:
        """Block what a failure cuts off, place the tasks that are ready, and move running tasks to better nodes."""
        yield from decisions.block(self.tasks, self.states)
        self._start_deadlines()
        ready, active = self._ready(now), self._active()
        self._announce(ready, active)
        view = None if nodes is None else ClusterView(nodes)
        if view is not None:
            yield from decisions.withdraw_stranded(active, self._history, view, now)
        for decision in plan_placement(ready, active, view, self.throughput, self._kinds, now):
            yield decisions.after_placement(decision, self.states, self._history, self._drivers.epoch, now)

    def _start_deadlines(self) -> None:
        """Start the deadlines of the tasks that wait for nothing but branches."""
        for task_id, task in self.tasks.items():
            waiting = task.quorum is not None and isinstance(self.states[task_id], Waiting)
            if waiting and readiness.required_parents_are_committed(task, self.states):
                self._deadlines.start(task)

    def _ready(self, now: float) -> list[ReadyTask]:
        """Return the tasks that can start now."""
        ready: list[ReadyTask] = []
        for task_id, state in self.states.items():
            if isinstance(state, (Waiting, Retrying)):
                task = self.tasks[task_id]
                if (isinstance(state, Waiting) or now >= state.not_before) and self._can_start(task):
                    ready.append(ReadyTask(task, self._history[task_id], state.progress))
        return ready

    def _can_start(self, task: Task) -> bool:
        if task.quorum is None:
            return readiness.can_start(task, self.states, 0.0)
        if task.quorum.at_least and self._has_suspect_branch(task.quorum):
            return False  # the task may have decided to start with this branch, and would find it damaged again
        return readiness.can_start(task, self.states, self._deadlines.waited(task))

    def _has_suspect_branch(self, quorum: BranchQuorum) -> bool:
        """Return True if a branch was found damaged, and no attempt has checked it or made it again since."""
        return any(self._history[id].suspect and not self.states[id].is_final for id, _ in quorum.branches)

    def _active(self) -> list[ActiveTask]:
        """Return the tasks that have an attempt."""
        active: list[ActiveTask] = []
        for task_id, placed in self._placed.items():
            state = self.states[task_id]
            if isinstance(state, (Placing, Running, Draining)):
                active.append(ActiveTask(placed.task, placed.group, state))
        return active

    def _announce(self, ready: Iterable[ReadyTask], active: Iterable[ActiveTask]) -> None:
        """Announce to the launcher which tasks can run now, if this has changed."""
        expected = sorted([*(each.task.id for each in active), *(each.task.id for each in ready)])
        if expected != self._expected:
            self._expected = expected
            self._launcher.expect([self.tasks[task_id] for task_id in expected])
