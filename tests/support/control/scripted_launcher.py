"""A controller whose launcher, store and clock a test sets by hand, and the tasks and nodes that it is given."""

from collections.abc import Sequence
from dataclasses import replace

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import AttemptNumber
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.control.controller import Controller
from bam_ray.control.observations import AttemptStatus, Done, Queued
from bam_ray.control.transitions import PlacedTask, Transition
from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.nodes import NodeFacts
from bam_ray.settings import Needs

NODE = Node("1", "one")


def make_task(name: str, *parents: str, steps: int = 10, attempts: int = 4) -> Task:
    """Return a branch whose identity is `name` and that has the given parents."""
    return Task(ArtifactKind.BRANCHES, name, name, parents, Needs(), total_steps=steps, max_attempts=attempts)


def make_measurable_task(name: str, steps: int = 100) -> Task:
    """Return a branch whose throughput the controller measures: its model and its tokens per step are known."""
    return replace(make_task(name, steps=steps), model="dense", step_tokens=10)


def make_node(name: str, free: float = 1.0, cpus: float = 1.0) -> NodeFacts:
    """Return a node of `cpus` CPUs, of which `free` are free, with the label `kind` set to its name."""
    return NodeFacts(name, name, "", {"CPU": cpus}, {"kind": name}, {"CPU": free})


def commit_task(store: MemoryStore, task: Task) -> None:
    """Commit an artifact without files for `task`."""
    Artifact(store, task.kind, task.id).commit(Manifest(id=task.id, kind=task.kind, name=task.name))


class ScriptedLauncher:
    """A launcher that starts nothing: it records its calls and returns the attempt statuses that a test sets."""

    def __init__(self) -> None:
        self.statuses: dict[str, AttemptStatus] = {}
        self.placed: list[tuple[str, frozenset[str]]] = []
        self.numbers: dict[str, AttemptNumber] = {}  # of the last attempt, by task id
        self.drained: list[str] = []
        self.known_nodes: list[NodeFacts] | None = None  # None: this launcher chooses nodes itself
        self.chosen_nodes: dict[str, str | None] = {}
        self.expected: list[list[str]] = []

    def nodes(self) -> list[NodeFacts] | None:
        """Return the nodes that the test has set."""
        return self.known_nodes

    def expect(self, tasks: Sequence[Task]) -> None:
        """Record the tasks that the controller expects to place."""
        self.expected.append([task.id for task in tasks])

    def place(self, placed: PlacedTask, avoid: frozenset[str], node_id: str | None = None) -> None:
        """Record a placement; the attempt is queued until the test sets another status."""
        task = placed.task
        assert task.id not in self.statuses, "two attempts at once"
        self.placed.append((task.id, avoid))
        self.numbers[task.id] = placed.number
        self.chosen_nodes[task.id] = node_id
        self.statuses[task.id] = Queued()

    def poll(self) -> dict[str, AttemptStatus]:
        """Return the status of every attempt."""
        return dict(self.statuses)

    def drain(self, task_id: str) -> None:
        """Record that the task was asked to stop."""
        self.drained.append(task_id)

    def free(self, task_id: str) -> None:
        """Forget the attempt at a task."""
        del self.statuses[task_id]

    @property
    def names(self) -> list[str]:
        """The identities of the placed tasks, in the order of their placement."""
        return [name for name, _ in self.placed]


class ControllerHarness:
    """A controller over a `ScriptedLauncher`, with a clock that a test advances by setting `now`."""

    def __init__(self, *tasks: Task, committed: tuple[str, ...] = ()) -> None:
        self.now = 0.0
        self.store = MemoryStore()
        self.launcher = ScriptedLauncher()
        self.tasks = {task.id: task for task in tasks}
        for name in committed:
            commit_task(self.store, self.tasks[name])
        self.controller = Controller(tasks, self.store, self.launcher, clock=lambda: self.now)

    def step(self, **statuses: AttemptStatus) -> list[Transition]:
        """Set the statuses of attempts and let the controller make one step."""
        self.launcher.statuses.update(statuses)
        return self.controller.step()

    def finish(self, name: str) -> None:
        """Commit the artifact of a task and let its attempt end."""
        commit_task(self.store, self.tasks[name])
        self.step(**{name: Done(NODE, Progress(10, 10))})

    def kinds(self) -> dict[str, type]:
        """Return the class of every task's state."""
        return {name: type(state) for name, state in self.controller.states.items()}
