"""What a launcher sees of one attempt at a task."""

from dataclasses import dataclass

from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import Progress


@dataclass(frozen=True)
class Queued:
    """No node has taken it yet."""


@dataclass(frozen=True)
class Alive:
    """It runs, as far as anyone can tell."""

    node: Node
    progress: Progress | None
    nodes: frozenset[str] = frozenset()  # ids of all that a group's ranks are on, as far as they have said so


@dataclass(frozen=True)
class Done:
    """It returned."""

    node: Node
    progress: Progress | None


@dataclass(frozen=True)
class Stopped:
    """It was asked to stop, and stopped cleanly."""

    node: Node
    progress: Progress | None


@dataclass(frozen=True)
class Broke:
    """It ended badly: by an error of its own, or because its process or node died."""

    error: str  # one line
    node: Node | None
    progress: Progress | None = None
    log: tuple[str, ...] = ()
    final: bool = False  # another attempt would end the same way
    node_fault: bool = False  # the node died, not the task
    store_fault: bool = False  # the blob store was away


Sighting = Queued | Alive | Done | Stopped | Broke
