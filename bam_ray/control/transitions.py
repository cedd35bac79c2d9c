"""A change of a task's state as a value, and what the launcher must do for it."""

from collections.abc import Iterable
from dataclasses import dataclass

from bam_ray.checkpoint.leases import AttemptNumber
from bam_ray.pipeline.states import History, State
from bam_ray.pipeline.tasks import Task
from bam_ray.scheduling.throughput import ThroughputGroup


@dataclass(frozen=True)
class PlacedTask:
    """The task of one attempt.

    Attributes:
        task: The task with the chosen resource request and number of workers.
        number: The number of the attempt.
        group: The throughput group that the attempt is measured in.
        suspect: True if a reader found the committed files of the task damaged, so that the attempt must check them.
    """

    task: Task
    number: AttemptNumber
    group: ThroughputGroup
    suspect: bool = False


@dataclass(frozen=True)
class Launch:
    """Start an attempt, on `node_id` or on a node that the launcher chooses outside `avoid`."""

    placed: PlacedTask
    avoid: frozenset[str]
    node_id: str | None


@dataclass(frozen=True)
class Drain:
    """Ask the attempt to write a checkpoint and stop."""


@dataclass(frozen=True)
class Free:
    """Release the resources of the attempt; kill it if it still runs."""


LauncherAction = Launch | Drain | Free


@dataclass(frozen=True)
class Transition:
    """A change of a task's state.

    Attributes:
        task_id: The task.
        previous: Its state before the change.
        state: Its state after the change.
        reason: Why it changes, for people.
        action: What the launcher must do; None if nothing.
        history: The history of the task after the change; None if it stays the same.
    """

    task_id: str
    previous: State
    state: State
    reason: str = ""
    action: LauncherAction | None = None
    history: History | None = None

    @property
    def changes_label(self) -> bool:
        """True if the new state is of another kind; False if only its progress or times are updated."""
        return self.previous.label != self.state.label


def changed_tasks(transitions: Iterable[Transition]) -> list[str]:
    """Return the ids of the tasks whose kind of state differs after all transitions from what it was before them.

    A task that was withdrawn from one node and placed again in the same step has transitions, but has not changed.
    """
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    for transition in transitions:
        before.setdefault(transition.task_id, transition.previous.label)
        after[transition.task_id] = transition.state.label
    return [task_id for task_id, label in after.items() if label != before[task_id]]
