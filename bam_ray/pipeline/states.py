"""What can be with a task, as types; only `Controller` moves a task from one to another.

Waiting ─▶ Placing ─▶ Running ─▶ Committed
   ▲          │          ├─▶ Retrying ─▶ Placing
   │          │          ├─▶ Draining ─▶ Waiting     (asked to stop)
   │          ▼          ▼
   └─ Blocked ◀─ ─ ─ ─ Failed                        (Blocked: a parent failed)
"""

from dataclasses import dataclass, field

from bam_ray.pipeline.tasks import Progress


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: `id` tells nodes apart, `name` is for people."""

    id: str
    name: str


@dataclass(frozen=True)
class Waiting:
    """For parents, or for its turn."""

    progress: Progress | None = None  # of an attempt that was moved or stopped


@dataclass(frozen=True)
class Blocked:
    """A task it is made from failed."""

    by: str  # "branches/law"


@dataclass(frozen=True)
class Placing:
    """Asked for; no node has taken it yet."""

    since: float = 0.0  # asked for; with no node meant: last seen in the launcher's queue
    node_id: str | None = None  # the node it was meant for; None: any that has room
    progress: Progress | None = None


@dataclass(frozen=True)
class Running:
    """A node works on it."""

    node: Node
    progress: Progress
    since: float  # when and at which step this attempt was first seen to train, for its speed
    first_step: int
    seen: float  # when the step last changed
    placed: float  # when this attempt was asked for
    nodes: frozenset[str] = frozenset()  # ids of all that a group's ranks are on; `node` is rank 0's

    @property
    def steps_per_second(self) -> float | None:
        """Since the first step of this attempt; None where there was no other."""
        steps, seconds = self.progress.step - self.first_step, self.seen - self.since
        return steps / seconds if steps > 0 and seconds > 0 else None


@dataclass(frozen=True)
class Draining:
    """Told to write a checkpoint and stop."""

    node: Node | None
    progress: Progress | None
    since: float
    placed: float
    moving: bool = False  # to go on, elsewhere or with more; otherwise the run is being stopped
    cause: str = "stopped"  # that its end will have


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
class Ended:
    """One attempt that is over. Times are the controller's clock's."""

    node: Node | None
    placed: float
    ended: float
    step: int  # that it reached
    cause: str  # "committed", "moved", "to absorb law", "stopped" or an error


@dataclass(frozen=True)
class History:
    """What the controller remembers of a task's attempts while it runs itself."""

    attempts: int = 0  # begun
    failures: int = 0  # in a row, of those that count against `Task.max_attempts`
    outages: int = 0  # the last so many ended because the blob store was away
    node_deaths: int = 0  # attempts that ended with their node since the last that got further
    checkpoint_step: int = 0  # the furthest seen
    avoid: frozenset[str] = field(default_factory=frozenset)  # ids of nodes it failed on since it last got further
    ended: tuple[Ended, ...] = ()
    said: str = ""  # of the demand that was taken
    no_place_since: float | None = None  # since when no nodes could hold it

    @property
    def would_wait(self) -> bool:
        """True if the task should wait for a busy node instead of returning to one that it failed on.

        One failure may be chance, and an idle node does no work. Two in a row may be the node's fault.
        """
        return self.failures > 1
