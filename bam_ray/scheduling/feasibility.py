"""Whether a cluster could ever do a run: said when it is first looked at, before anything has been spent.

Machines join one after another, after a start or when the head was begun again. So a head that is alone says nothing
yet, and a group is not refused before all its workers had time to come. What was once found possible is waited for
from then on, whichever nodes are away.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bam_ray.pipeline.tasks import Task
from bam_ray.scheduling import elastic
from bam_ray.scheduling.cluster_view import Snapshot
from bam_ray.scheduling.nodes import NodeFacts

JOIN_PATIENCE = 600.0  # seconds that a head has for its first worker, which may be a machine that is still to start


class DemandCheck:
    """Checks the demands of all tasks twice: each worker's at the first look, a group's `elastic.PATIENCE` later."""

    def __init__(self, now: float) -> None:
        self._begun = now
        self._joined: float | None = None  # when there was more than a head
        self._seen: dict[str, NodeFacts] = {}
        self._done = False

    def look(self, tasks: Iterable[Task], nodes: Sequence[NodeFacts], now: float) -> None:
        """Raises `PlacementError` for the first of `tasks` that all nodes seen so far could not hold."""
        if self._done:
            return
        self._seen.update((node.id, node) for node in nodes)
        if self._joined is None:
            if all(node.is_head for node in nodes) and now - self._begun < JOIN_PATIENCE:
                return
            self._joined = now
            self._check(replace(task, workers=1) for task in tasks)
        elif now - self._joined >= elastic.PATIENCE:
            self._done = True
            self._check(tasks)

    def _check(self, tasks: Iterable[Task]) -> None:
        seen = Snapshot(list(self._seen.values()))
        for task in tasks:
            if elastic.shrunk(task, seen.can_hold) is None:
                seen.taken(task)
