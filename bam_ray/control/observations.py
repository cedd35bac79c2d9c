"""The status of an attempt, as a launcher reports it."""

from dataclasses import dataclass

from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import Progress


@dataclass(frozen=True)
class Queued:
    """No node has started the attempt yet."""


@dataclass(frozen=True)
class Alive:
    """The attempt runs, as far as is known."""

    node: Node
    progress: Progress | None
    nodes: frozenset[str] = frozenset()  # ids of the nodes of a group's ranks that have reported theirs
    signs: int = 0  # how often the work has reported or asked whether to stop


@dataclass(frozen=True)
class Done:
    """The attempt returned."""

    node: Node
    progress: Progress | None


@dataclass(frozen=True)
class Stopped:
    """The attempt stopped cleanly, as it was asked to."""

    node: Node
    progress: Progress | None


@dataclass(frozen=True)
class Crashed:
    """The attempt ended with an error, or its process or node died."""

    error: str  # one line
    node: Node | None
    progress: Progress | None = None
    log: tuple[str, ...] = ()
    final: bool = False  # another attempt would end in the same way
    node_fault: bool = False  # the node died; the task did not cause it
    store_fault: bool = False  # the blob store was unavailable, or it denied a request
    stale: bool = False  # a newer attempt has taken over
    damaged: str | None = None  # id of an artifact whose committed files the attempt found damaged


AttemptStatus = Queued | Alive | Done | Stopped | Crashed
