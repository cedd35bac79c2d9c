"""The states of a task, and the history of its attempts. Only `Controller` changes the state of a task.

Waiting ─▶ Placing ─▶ Running ─▶ Committed
   ▲          │          ├─▶ Retrying ─▶ Placing
   │          │          ├─▶ Draining ─▶ Waiting     (asked to stop)
   │          │          ├─▶ MadeElsewhere           (another driver took over)
   │          ▼          ▼
   └─ Blocked ◀─ ─ ─ ─ Failed                        (Blocked: a parent failed)

Committed ─▶ Waiting, if a reader finds the committed files damaged.
Waiting ─▶ MadeElsewhere ─▶ Waiting or Committed, while another driver works on the same store.

Every state has a `label`, a `node`, a `progress`, and two flags. `is_active` is True while the launcher holds an
attempt at the task. `is_final` is True if the task will not be attempted again.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from bam_ray.pipeline.tasks import Progress

StateLabel = Literal[
    "waiting", "elsewhere", "blocked", "placing", "running", "draining", "retrying", "committed", "failed"
]


@dataclass(frozen=True)
class Node:
    """A node of the cluster: `id` is unique, `name` is for people."""

    id: str
    name: str


@dataclass(frozen=True)
class Waiting:
    """The task waits for its parents, or for capacity."""

    label: ClassVar[StateLabel] = "waiting"
    is_active: ClassVar[bool] = False
    is_final: ClassVar[bool] = False
    node: ClassVar[None] = None
    progress: Progress | None = None  # of the last attempt, if it was moved or stopped


@dataclass(frozen=True)
class MadeElsewhere:
    """Another driver of the same store makes the artifact."""

    label: ClassVar[StateLabel] = "elsewhere"
    is_active: ClassVar[bool] = False
    is_final: ClassVar[bool] = False
    node: ClassVar[None] = None
    driver: str  # a description of the driver
    progress: Progress | None = None


@dataclass(frozen=True)
class Blocked:
    """A task that this one is made from has failed."""

    label: ClassVar[StateLabel] = "blocked"
    is_active: ClassVar[bool] = False
    is_final: ClassVar[bool] = True
    node: ClassVar[None] = None
    progress: ClassVar[None] = None
    by: str  # the failed task, such as "branches/law"


@dataclass(frozen=True)
class Placing:
    """An attempt was requested; no node runs it yet."""

    label: ClassVar[StateLabel] = "placing"
    is_active: ClassVar[bool] = True
    is_final: ClassVar[bool] = False
    node: ClassVar[None] = None
    since: float = 0.0  # time of the request; without `node_id`: when it was last seen in the launcher's queue
    node_id: str | None = None  # the node that it was placed on; None: any node with capacity
    progress: Progress | None = None

    @property
    def placed_at(self) -> float:
        """The time of the request, for the record of the attempt."""
        return self.since


@dataclass(frozen=True)
class Running:
    """A node runs the task."""

    label: ClassVar[StateLabel] = "running"
    is_active: ClassVar[bool] = True
    is_final: ClassVar[bool] = False
    node: Node  # of rank 0
    progress: Progress
    measured_from: float  # when, and at which step, this attempt was first seen to train; its speed counts from there
    first_step: int
    last_step_at: float  # when the step last changed
    placed_at: float  # when this attempt was requested
    nodes: frozenset[str] = frozenset()  # ids of the nodes of all ranks of a group
    signs: int = 0  # how often the work had shown a sign of life by `last_sign_at`
    last_sign_at: float = 0.0
    longest_silence: float = 0.0  # seconds between two signs of life since the first step

    @property
    def steps_per_second(self) -> float | None:
        """The mean speed since the first step of this attempt; None before its second step."""
        steps, seconds = self.progress.step - self.first_step, self.last_step_at - self.measured_from
        return steps / seconds if steps > 0 and seconds > 0 else None


@dataclass(frozen=True)
class Draining:
    """The attempt was asked to write a checkpoint and stop."""

    label: ClassVar[StateLabel] = "draining"
    is_active: ClassVar[bool] = True
    is_final: ClassVar[bool] = False
    node: Node | None
    progress: Progress | None
    since: float  # when it was asked
    placed_at: float
    moving: bool = False  # True: the task continues in another attempt; False: the run is being stopped
    cause: str = "stopped"  # the cause that the record of this attempt will show


@dataclass(frozen=True)
class Retrying:
    """An attempt failed, or no node can hold the task; the next attempt starts at `not_before`."""

    label: ClassVar[StateLabel] = "retrying"
    is_active: ClassVar[bool] = False
    is_final: ClassVar[bool] = False
    node: ClassVar[None] = None
    error: str
    not_before: float
    progress: Progress | None = None


@dataclass(frozen=True)
class Committed:
    """The manifest of the task's artifact is in the blob store."""

    label: ClassVar[StateLabel] = "committed"
    is_active: ClassVar[bool] = False
    is_final: ClassVar[bool] = True
    node: ClassVar[None] = None
    progress: Progress | None = None
    generation: int = 0  # how often the artifact was made again because its files were damaged


@dataclass(frozen=True)
class Failed:
    """The task is not attempted again."""

    label: ClassVar[StateLabel] = "failed"
    is_active: ClassVar[bool] = False
    is_final: ClassVar[bool] = True
    error: str
    node: Node | None = None
    log: tuple[str, ...] = ()  # the end of the traceback and of the process's log
    progress: Progress | None = None


MOST_PAST_ATTEMPTS = 20

State = Waiting | MadeElsewhere | Blocked | Placing | Running | Draining | Retrying | Committed | Failed
Active = Placing | Running | Draining


@dataclass(frozen=True)
class AttemptRecord:
    """One finished attempt. Times are those of the controller's clock."""

    node: Node | None
    placed: float  # when it was requested
    ended: float
    step: int  # the last step that it reached
    cause: str  # "committed", "moved", "to absorb law", "stopped" or an error


@dataclass(frozen=True)
class History:
    """The attempts at a task that this controller has started."""

    attempts: int = 0  # number of attempts started
    failures: int = 0  # consecutive failures that count against `Task.max_attempts`
    outages: int = 0  # consecutive attempts that ended because the blob store was unavailable
    node_deaths: int = 0  # attempts whose node died, since the last attempt that advanced the checkpoint
    checkpoint_step: int = 0  # the largest step of a checkpoint so far
    avoid: frozenset[str] = field(default_factory=frozenset)  # ids of nodes it failed on since the checkpoint advanced
    kills: int = 0  # attempts that were killed because they did not stop, since the checkpoint last advanced
    past_attempts: tuple[AttemptRecord, ...] = ()  # the newest `MOST_PAST_ATTEMPTS`
    message: str = ""  # about the placement of the last attempt: a fallback request, or fewer workers
    suspect: bool = False  # a reader found the committed files damaged, and no attempt has checked them since
    suspect_generation: int = -1  # the newest generation of the artifact that was suspect
    no_capacity_since: float | None = None  # since when the cluster could not hold all workers, even if it were idle

    @property
    def waits_for_other_nodes(self) -> bool:
        """True if the task should wait for a busy node instead of returning to one that it failed on.

        One failure may be chance, and an idle node does no work. Two in a row may be the node's fault.
        """
        return self.failures > 1

    def with_past_attempt(self, record: AttemptRecord) -> "History":
        """Return this history with one more finished attempt."""
        return replace(self, past_attempts=(*self.past_attempts, record)[-MOST_PAST_ATTEMPTS:])
