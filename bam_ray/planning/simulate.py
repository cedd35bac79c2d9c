"""A run on a cluster that is not there: the real controller and its policies, a simulated launcher and clock.

Nothing sleeps: time jumps from event to event (a first step, an end, a node that is taken away or comes back), with a
look of the controller soon after each. Nodes are taken away at random times, which follow from `seed` alone.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.manifest import MANIFEST
from bam_ray.control.controller import Controller, RunOutcome
from bam_ray.control.observations import Alive, AttemptStatus, Crashed, Done, Queued, Stopped
from bam_ray.control.transitions import changed_tasks
from bam_ray.pipeline.states import AttemptRecord, Committed, Failed, Node, Retrying
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.planning.cluster_file import ClusterFile, NodeGroup
from bam_ray.scheduling.nodes import NODE_ID, NodeFacts, count_fitting, ray_resources, label_selector, selects

SpeedOf = Callable[[Task, NodeGroup], float | None]  # tokens a second of one worker; None: the task does not train
YEAR = 365 * 86400.0  # longer than any run that ends
SOON = 1.0  # seconds until the controller looks again after something has happened


@dataclass
class _Machine:
    """A node that is there, or will be again."""

    name: str
    group: NodeGroup
    facts: NodeFacts
    free: dict[str, float] = field(default_factory=dict)
    gone_at: float = math.inf
    back_at: float = math.inf
    alive: bool = True

    def use(self, wanted: Mapping[str, float], times: int) -> None:
        """Take (or with -1 give back) room; the facts that the controller sees are always the present ones."""
        for name, amount in wanted.items():
            self.free[name] -= times * amount


@dataclass
class _Run:
    """One attempt."""

    task: Task
    node_id: str | None
    avoid: frozenset[str]
    machines: list[_Machine] = field(default_factory=list)  # one a worker
    first_step: int = 0  # that it goes on from
    trains_from: float = math.inf
    step_seconds: float = math.inf
    experts: tuple[str, ...] = ()  # of a mixture that may absorb others
    stops_at: float = math.inf
    ends_at: float = math.inf
    broke: bool = False

    @property
    def node(self) -> Node:
        return Node(self.machines[0].facts.id, self.machines[0].name)

    def step(self, now: float) -> int:
        """Steps that are done."""
        until = min(now, self.stops_at)
        if until < self.trains_from:
            return self.first_step
        # A step that ends now has ended, whatever rounding says
        return min(self.task.total_steps, self.first_step + int((until - self.trains_from) / self.step_seconds + 1e-6))


class SimulatedLauncher:
    """A `Launcher` over the nodes of a cluster file, at the time `now`."""

    def __init__(
        self,
        cluster: ClusterFile,
        store: MemoryStore,
        speed_of: SpeedOf,
        checkpoint_every: Mapping[str, int],
        seed: int,
    ) -> None:
        self.now = 0.0
        self.preemptions = 0
        self._cluster = cluster
        self._store = store
        self._speed_of = speed_of
        self._checkpoint_every = checkpoint_every  # steps, by task id
        self._random = random.Random(seed)
        self._runs: dict[str, _Run] = {}
        self._durable: dict[str, int] = {}  # the step of each task's last checkpoint
        self._born = 0
        self._machines: list[_Machine] = []
        for kind, group in cluster.nodes.items():
            for number in range(group.count):
                machine = _Machine(f"{kind}-{number}", group, NodeFacts("", "", "", {}))
                self._machines.append(machine)
                self._start(machine)

    # The protocol

    def nodes(self) -> list[NodeFacts]:
        return [machine.facts for machine in self._machines if machine.alive]

    def expect(self, tasks: Sequence[Task]) -> None:
        """The cluster is as large as it is."""

    def place(self, task: Task, avoid: frozenset[str], node_id: str | None = None) -> None:
        run = self._runs[task.id] = _Run(task, node_id, avoid)
        self._seat(run)

    def poll(self) -> dict[str, AttemptStatus]:
        return {task_id: self._look(run) for task_id, run in self._runs.items()}

    def drain(self, task_id: str) -> None:
        run = self._runs[task_id]
        if run.step_seconds == math.inf:  # a stage that does not train stops with its work undone
            run.stops_at = run.ends_at = self.now
            return
        steps = math.floor((max(self.now, run.trains_from) - run.trains_from) / run.step_seconds + 1e-6) + 1
        run.stops_at = run.trains_from + steps * run.step_seconds
        run.ends_at = min(run.ends_at, run.stops_at + self._cluster.checkpoint_seconds)

    def free(self, task_id: str) -> None:
        run = self._runs.pop(task_id)
        for machine in run.machines:
            machine.use(ray_resources(run.task.needs), -1)
        self._seat_queue()

    # The clock

    def next_event(self) -> float:
        """When something happens next, of itself."""
        times = [min(machine.gone_at, machine.back_at) for machine in self._machines]
        for run in self._runs.values():
            if run.machines and not run.broke:
                first = run.trains_from + run.step_seconds
                times.append(first if self.now < first < run.ends_at else run.ends_at)
        return min((time for time in times if time > self.now), default=math.inf)

    def advance(self, now: float) -> None:
        """Let everything happen that happens until `now`."""
        self.now = now
        for machine in self._machines:
            if machine.gone_at <= now:
                self._take_away(machine)
            elif machine.back_at <= now:
                self._start(machine)
        for run in self._runs.values():
            if run.machines and not run.broke:
                self._note_checkpoint(run)
        self._seat_queue()

    def _start(self, machine: _Machine) -> None:
        self._born += 1
        id = f"node-{self._born:05d}"
        labels = {**machine.group.all_labels, NODE_ID: id}
        machine.free = dict(machine.group.resources)
        machine.facts = NodeFacts(id, machine.name, "", machine.group.resources, labels, machine.free)
        machine.alive, machine.back_at = True, math.inf
        rate = machine.group.preemptions_per_hour / 3600.0
        machine.gone_at = self.now + self._random.expovariate(rate) if rate else math.inf

    def _take_away(self, machine: _Machine) -> None:
        self.preemptions += 1
        machine.alive = False
        machine.gone_at, machine.back_at = math.inf, self.now + machine.group.replacement_seconds
        for run in self._runs.values():
            if machine in run.machines:
                self._note_checkpoint(run)
                run.broke = True

    def _seat_queue(self) -> None:
        """First come, first served."""
        for run in self._runs.values():
            if not run.machines:
                self._seat(run)

    def _seat(self, run: _Run) -> None:
        wanted = ray_resources(run.task.needs)
        living = [machine for machine in self._machines if machine.alive]
        if run.node_id:
            fitting = [machine for machine in living if machine.facts.id == run.node_id]
        else:
            selector = label_selector(run.task, run.avoid, [machine.facts for machine in living])
            fitting = [machine for machine in living if selects(selector, machine.facts.labels)]
            fitting.sort(key=lambda machine: sum(machine.free.values()), reverse=True)  # spread, as Ray is asked to
        seats: list[_Machine] = []
        for machine in fitting:
            seats += [machine] * count_fitting(wanted, machine.free, run.task.workers - len(seats))
            if len(seats) == run.task.workers:
                break
        if len(seats) < run.task.workers:
            return
        run.machines = seats
        for machine in seats:
            machine.use(wanted, 1)
        self._begin(run)

    def _begin(self, run: _Run) -> None:
        speeds = [self._speed_of(run.task, machine.group) for machine in run.machines]
        run.first_step = self._durable.get(run.task.id, 0)
        late = run.task.quorum.branches if run.task.quorum else ()
        run.experts = tuple(name for id, name in late if self._store.exists(f"branches/{id}/{MANIFEST}"))
        started = self.now + self._cluster.start_seconds
        known = [speed for speed in speeds if speed]
        if not known or not run.task.total_steps:
            run.ends_at = started + self._cluster.stage_seconds.get(run.task.kind, 0.0)
            return
        run.trains_from = started
        run.step_seconds = run.task.step_tokens / (len(speeds) * min(known))  # a group waits for its slowest
        steps = run.task.total_steps - run.first_step
        run.ends_at = started + steps * run.step_seconds + self._cluster.checkpoint_seconds

    def _note_checkpoint(self, run: _Run) -> None:
        """Uploads go on behind the training: what was written `checkpoint_seconds` ago is safe."""
        every = self._checkpoint_every.get(run.task.id, 0)
        if every and run.trains_from < math.inf:
            reached = run.step(self.now - self._cluster.checkpoint_seconds) // every * every
            self._durable[run.task.id] = max(self._durable.get(run.task.id, 0), reached)

    def _look(self, run: _Run) -> AttemptStatus:
        if not run.machines:
            return Queued()
        step = run.step(self.now)
        total = run.task.total_steps
        durable = self._durable.get(run.task.id)
        trained = step > run.first_step
        progress = Progress(step, total, checkpoint_step=durable, experts=run.experts) if trained else None
        if run.broke:
            lost = Progress(durable or 0, total, checkpoint_step=durable)
            return Crashed(f"node {run.node.name} was preempted", run.node, lost, node_fault=True)
        if self.now < run.ends_at:
            return Alive(run.node, progress)
        if run.stops_at < math.inf and step < total:
            self._durable[run.task.id] = step
            return Stopped(run.node, Progress(step, total, checkpoint_step=step))
        self._store.put(f"{run.task.kind}/{run.task.id}/{MANIFEST}", b"{}")
        return Done(run.node, Progress(total, total))


@dataclass(frozen=True)
class SimulationResult:
    """How a simulated run went. Times in seconds from its begin."""

    outcome: RunOutcome
    seconds: float
    attempts: Mapping[str, tuple[AttemptRecord, ...]]  # by task id
    preemptions: int
    errors: Mapping[str, str]  # of tasks that failed, by id

    @property
    def moves(self) -> int:
        """How often a task was moved to another node."""
        return sum(ended.cause == "moved" for attempts in self.attempts.values() for ended in attempts)

    def committed(self, task_id: str) -> bool:
        """Whether a task was done in the end."""
        attempts = self.attempts[task_id]
        return bool(attempts) and attempts[-1].cause == "committed"

    def span(self, task_ids: Sequence[str]) -> tuple[float, float]:
        """From the first of these tasks being placed until the last has ended."""
        attempts = [ended for task_id in task_ids for ended in self.attempts[task_id]]
        return min(ended.placed for ended in attempts), max(ended.ended for ended in attempts)


def simulate(
    tasks: Sequence[Task],
    cluster: ClusterFile,
    speed_of: SpeedOf,
    checkpoint_every: Mapping[str, int],
    seed: int = 0,
    look_every: float = 60.0,
    grain: float = SOON,
    until: float = YEAR,
) -> SimulationResult:
    """Run `tasks` on `cluster` to their end, or for `until` seconds: the outcome is "running" then.

    The controller looks when something happens, soon after, and at least every `look_every` seconds while anything can
    move; tasks that wait for another attempt get it at most `grain` seconds late.
    """
    store = MemoryStore()
    launcher = SimulatedLauncher(cluster, store, speed_of, checkpoint_every, seed)
    controller = Controller(tasks, store, launcher, clock=lambda: launcher.now, wall=lambda: launcher.now)
    alone = [task.id for task in tasks if task.trains_alone]
    while True:
        transitions = controller.step()
        now = launcher.now
        if controller.outcome() != "running" or now >= until:
            break
        retries = [state.not_before for state in controller.states.values() if isinstance(state, Retrying)]
        # One that could have begun already waits for room, which comes with an event
        times = [launcher.next_event(), until, *(max(now + grain, retry) for retry in retries if retry > now)]
        if changed_tasks(transitions):
            times.append(now + SOON)
        if any(not isinstance(controller.states[task_id], Committed) for task_id in alone):
            times.append(now + look_every)  # what moves, moves between events too
        launcher.advance(min(times))
    histories = {task_id: controller.history(task_id).past_attempts for task_id in controller.tasks}
    errors = {task_id: state.error for task_id, state in controller.states.items() if isinstance(state, Failed)}
    return SimulationResult(controller.outcome(), launcher.now, histories, launcher.preemptions, errors)
