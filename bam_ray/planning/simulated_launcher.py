"""A launcher over the nodes of a cluster file, on a simulated clock.

Nodes are preempted at random times, which depend on the seed alone.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.manifest import MANIFEST
from bam_ray.control.observations import Alive, AttemptStatus, Crashed, Done, Queued, Stopped
from bam_ray.control.transitions import PlacedTask
from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.planning.cluster_file import ClusterFile, NodeGroup
from bam_ray.scheduling.nodes import NODE_ID, NodeFacts, count_fitting, label_selector, ray_resources, selects

SpeedOf = Callable[[Task, NodeGroup], float | None]  # tokens per second of one worker; None: the task does not train
ROUNDING = 1e-6  # fraction of a step that may be missing through rounding when a step ends exactly now


@dataclass
class _SimulatedNode:
    """A node that is alive or will be replaced."""

    name: str
    group: NodeGroup
    facts: NodeFacts
    free: dict[str, float] = field(default_factory=dict)
    preempted_at: float = math.inf
    replaced_at: float = math.inf
    alive: bool = True

    def allocate(self, resources: Mapping[str, float], times: int) -> None:
        """Allocate `resources`, or release them if `times` is -1; `facts.free` is the same object as `free`."""
        for name, amount in resources.items():
            self.free[name] -= times * amount


@dataclass
class _SimulatedAttempt:
    """One attempt at a task; it is queued until it has nodes."""

    task: Task
    node_id: str | None
    avoid: frozenset[str]
    nodes: list[_SimulatedNode] = field(default_factory=list)  # one for each worker
    first_step: int = 0  # step of the checkpoint that the attempt resumes from
    trains_from: float = math.inf
    step_seconds: float = math.inf
    experts: tuple[str, ...] = ()  # names of the branches in a mixture that can absorb late ones
    stops_at: float = math.inf
    ends_at: float = math.inf
    crashed: bool = False

    @property
    def node(self) -> Node:
        """The node of the first worker."""
        return Node(self.nodes[0].facts.id, self.nodes[0].name)

    def step(self, now: float) -> int:
        """Return the number of completed steps."""
        until = min(now, self.stops_at)
        if until < self.trains_from:
            return self.first_step
        trained = int((until - self.trains_from) / self.step_seconds + ROUNDING)
        return min(self.task.total_steps, self.first_step + trained)


class SimulatedLauncher:
    """A `Launcher` that simulates attempts on the nodes of a cluster file.

    `now` is the simulated time in seconds, and `preemptions` counts the preempted nodes.

    Args:
        cluster: The nodes, and the durations of starts, checkpoints and stages.
        store: Receives the manifests of the tasks that are done.
        speed_of: Returns the tokens per second of one worker.
        checkpoint_every: The steps between two checkpoints, by task id.
        seed: The seed of the preemption times.
    """

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
        self._checkpoint_every = checkpoint_every
        self._random = random.Random(seed)
        self._attempts: dict[str, _SimulatedAttempt] = {}
        self._checkpoint_steps: dict[str, int] = {}  # step of the last checkpoint, by task id
        self._started_nodes = 0
        self._nodes: list[_SimulatedNode] = []
        for kind, group in cluster.nodes.items():
            for number in range(group.count):
                node = _SimulatedNode(f"{kind}-{number}", group, NodeFacts("", "", "", {}))
                self._nodes.append(node)
                self._start_node(node)

    # The `Launcher` protocol

    def nodes(self) -> list[NodeFacts]:
        """See `Launcher`."""
        return [node.facts for node in self._nodes if node.alive]

    def expect(self, tasks: Sequence[Task]) -> None:
        """Do nothing: the cluster has a fixed size."""

    def place(self, placed: PlacedTask, avoid: frozenset[str], node_id: str | None = None) -> None:
        """See `Launcher`."""
        attempt = self._attempts[placed.task.id] = _SimulatedAttempt(placed.task, node_id, avoid)
        self._try_to_place(attempt)

    def poll(self) -> dict[str, AttemptStatus]:
        """See `Launcher`."""
        return {task_id: self._status_of(attempt) for task_id, attempt in self._attempts.items()}

    def drain(self, task_id: str) -> None:
        """See `Launcher`."""
        attempt = self._attempts[task_id]
        if attempt.step_seconds == math.inf:  # a stage that does not train stops at once and loses its work
            attempt.stops_at = attempt.ends_at = self.now
            return
        trained = (max(self.now, attempt.trains_from) - attempt.trains_from) / attempt.step_seconds
        steps = math.floor(trained + ROUNDING) + 1
        attempt.stops_at = attempt.trains_from + steps * attempt.step_seconds
        attempt.ends_at = min(attempt.ends_at, attempt.stops_at + self._cluster.checkpoint_seconds)

    def free(self, task_id: str) -> None:
        """See `Launcher`."""
        attempt = self._attempts.pop(task_id)
        for node in attempt.nodes:
            node.allocate(ray_resources(attempt.task.needs), -1)
        self._place_queued()

    # The clock

    def next_event(self) -> float:
        """Return the time of the next first step, end of an attempt, preemption or replacement."""
        times = [min(node.preempted_at, node.replaced_at) for node in self._nodes]
        for attempt in self._attempts.values():
            if attempt.nodes and not attempt.crashed:
                first = attempt.trains_from + attempt.step_seconds
                times.append(first if self.now < first < attempt.ends_at else attempt.ends_at)
        return min((time for time in times if time > self.now), default=math.inf)

    def advance(self, now: float) -> None:
        """Set the clock to `now`, and simulate all events until then."""
        self.now = now
        for node in self._nodes:
            if node.preempted_at <= now:
                self._preempt(node)
            elif node.replaced_at <= now:
                self._start_node(node)
        for attempt in self._attempts.values():
            if attempt.nodes and not attempt.crashed:
                self._update_checkpoint(attempt)
        self._place_queued()

    def _start_node(self, node: _SimulatedNode) -> None:
        self._started_nodes += 1
        id = f"node-{self._started_nodes:05d}"
        labels = {**node.group.all_labels, NODE_ID: id}
        node.free = dict(node.group.resources)
        node.facts = NodeFacts(id, node.name, "", node.group.resources, labels, node.free)
        node.alive, node.replaced_at = True, math.inf
        rate = node.group.preemptions_per_hour / 3600.0
        node.preempted_at = self.now + self._random.expovariate(rate) if rate else math.inf

    def _preempt(self, node: _SimulatedNode) -> None:
        self.preemptions += 1
        node.alive = False
        node.preempted_at, node.replaced_at = math.inf, self.now + node.group.replacement_seconds
        for attempt in self._attempts.values():
            if node in attempt.nodes:
                self._update_checkpoint(attempt)
                attempt.crashed = True

    def _place_queued(self) -> None:
        """Place the queued attempts that fit now, first come, first served."""
        for attempt in self._attempts.values():
            if not attempt.nodes:
                self._try_to_place(attempt)

    def _try_to_place(self, attempt: _SimulatedAttempt) -> None:
        """Start the attempt if all of its workers fit now; otherwise it stays in the queue."""
        wanted = ray_resources(attempt.task.needs)
        alive = [node for node in self._nodes if node.alive]
        if attempt.node_id:
            candidates = [node for node in alive if node.facts.id == attempt.node_id]
        else:
            selector = label_selector(attempt.task, attempt.avoid, [node.facts for node in alive])
            candidates = [node for node in alive if selects(selector, node.facts.labels)]
            # Emptiest nodes first, because Ray is asked to spread the workers
            candidates.sort(key=lambda node: sum(node.free.values()), reverse=True)
        chosen: list[_SimulatedNode] = []
        for node in candidates:
            chosen += [node] * count_fitting(wanted, node.free, attempt.task.workers - len(chosen))
            if len(chosen) == attempt.task.workers:
                break
        if len(chosen) < attempt.task.workers:
            return
        attempt.nodes = chosen
        for node in chosen:
            node.allocate(wanted, 1)
        self._start_attempt(attempt)

    def _start_attempt(self, attempt: _SimulatedAttempt) -> None:
        """Compute the times of the attempt's first step and end."""
        task = attempt.task
        speeds = [self._speed_of(task, node.group) for node in attempt.nodes]
        attempt.first_step = self._checkpoint_steps.get(task.id, 0)
        branches = task.quorum.branches if task.quorum else ()
        attempt.experts = tuple(name for id, name in branches if self._store.exists(f"branches/{id}/{MANIFEST}"))
        started = self.now + self._cluster.start_seconds
        known = [speed for speed in speeds if speed]
        if not known or not task.total_steps:
            attempt.ends_at = started + self._cluster.stage_seconds.get(task.kind, 0.0)
            return
        attempt.trains_from = started
        attempt.step_seconds = task.step_tokens / (len(speeds) * min(known))  # a group is as fast as its slowest worker
        steps = task.total_steps - attempt.first_step
        attempt.ends_at = started + steps * attempt.step_seconds + self._cluster.checkpoint_seconds

    def _update_checkpoint(self, attempt: _SimulatedAttempt) -> None:
        """Record the last checkpoint that is in the store now: uploads take `checkpoint_seconds` beside training."""
        task_id = attempt.task.id
        every = self._checkpoint_every.get(task_id, 0)
        if every and attempt.trains_from < math.inf:
            step = attempt.step(self.now - self._cluster.checkpoint_seconds) // every * every
            self._checkpoint_steps[task_id] = max(self._checkpoint_steps.get(task_id, 0), step)

    def _status_of(self, attempt: _SimulatedAttempt) -> AttemptStatus:
        if not attempt.nodes:
            return Queued()
        task = attempt.task
        step, total = attempt.step(self.now), task.total_steps
        saved = self._checkpoint_steps.get(task.id)
        trained = step > attempt.first_step
        progress = Progress(step, total, checkpoint_step=saved, experts=attempt.experts) if trained else None
        if attempt.crashed:
            last = Progress(saved or 0, total, checkpoint_step=saved)
            return Crashed(f"node {attempt.node.name} was preempted", attempt.node, last, node_fault=True)
        if self.now < attempt.ends_at:
            return Alive(attempt.node, progress, signs=int(self.now))  # it never hangs
        if attempt.stops_at < math.inf and step < total:
            self._checkpoint_steps[task.id] = step
            return Stopped(attempt.node, Progress(step, total, checkpoint_step=step))
        self._store.put(f"{task.kind}/{task.id}/{MANIFEST}", b"{}")
        return Done(attempt.node, Progress(total, total))
