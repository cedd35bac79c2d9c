"""What can be with a task, as types; only `Controller` moves a task from one to another.

Waiting ─▶ Placing ─▶ Running ─▶ Committed
   ▲          │          ├─▶ Retrying ─▶ Placing
   │          │          ├─▶ Draining ─▶ Waiting     (asked to stop)
   │          ▼          ▼
   └─ Blocked ◀─ ─ ─ ─ Failed                        (Blocked: a parent failed)
"""

from dataclasses import dataclass, field

from bam_ray.control.tasks import Progress


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: `id` tells nodes apart, `name` is for people."""

    id: str
    name: str


@dataclass(frozen=True)
class Waiting:
    """For parents, or for its turn."""


@dataclass(frozen=True)
class Blocked:
    """A task it is made from failed."""

    by: str  # "branches/law"


@dataclass(frozen=True)
class Placing:
    """Asked for; no node has taken it yet."""


@dataclass(frozen=True)
class Running:
    """A node works on it."""

    node: Node
    progress: Progress
    since: float  # when and at which step this attempt was first seen, for its speed
    first_step: int


@dataclass(frozen=True)
class Draining:
    """Told to write a checkpoint and stop."""

    node: Node | None
    progress: Progress | None
    since: float


@dataclass(frozen=True)
class Retrying:
    """An attempt ended badly; another begins at `not_before`."""

    error: str
    not_before: float
    progress: Progress | None = None


@dataclass(frozen=True)
class Committed:
    """Its manifest is in the blob store."""

    progress: Progress | None = None


@dataclass(frozen=True)
class Failed:
    """Given up."""

    error: str
    node: Node | None = None
    log: tuple[str, ...] = ()  # the end of its traceback and of its log
    progress: Progress | None = None


State = Waiting | Blocked | Placing | Running | Draining | Retrying | Committed | Failed


@dataclass(frozen=True)
class History:
    """What the controller remembers of a task's attempts while it runs itself."""

    attempts: int = 0  # begun
    failures: int = 0  # of those that count against `Task.max_attempts`
    checkpoint_step: int = 0  # the furthest seen
    avoid: frozenset[str] = field(default_factory=frozenset)  # ids of nodes it failed on
