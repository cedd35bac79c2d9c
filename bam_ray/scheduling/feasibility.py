"""The check that a cluster can run all tasks of a recipe, made before anything has been spent.

Nodes join one after another, after the start of a cluster or after a restart of its head. A head without workers
therefore proves nothing, and a group is rejected only after all of its workers have had time to join. Nodes that have
left still count: a task that was feasible once waits until such nodes return.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bam_ray.pipeline.tasks import Task
from bam_ray.scheduling import elastic
from bam_ray.scheduling.cluster_view import ClusterView
from bam_ray.scheduling.nodes import NodeFacts

JOIN_TIMEOUT = 600.0  # seconds until the first worker joins the head; its machine may have to start first


class FeasibilityCheck:
    """Checks all tasks twice: single workers when nodes have joined, whole groups `elastic.SHRINK_TIMEOUT` later."""

    def __init__(self, now: float) -> None:
        self._started = now
        self._joined: float | None = None  # time of the first check: a node besides the head, or JOIN_TIMEOUT
        self._known: dict[str, NodeFacts] = {}
        self._done = False

    def check(self, tasks: Iterable[Task], nodes: Sequence[NodeFacts], now: float) -> None:
        """Check `tasks` if a check is due.

        Raises:
            PlacementError: All nodes that were ever alive could not hold one of the tasks together.
        """
        if self._done:
            return
        self._known.update((node.id, node) for node in nodes)
        if self._joined is None:
            if all(node.is_head for node in nodes) and now - self._started < JOIN_TIMEOUT:
                return
            self._joined = now
            self._check_all(replace(task, workers=1) for task in tasks)
        elif now - self._joined >= elastic.SHRINK_TIMEOUT:
            self._done = True
            self._check_all(tasks)

    def _check_all(self, tasks: Iterable[Task]) -> None:
        view = ClusterView(list(self._known.values()))
        for task in tasks:
            if elastic.with_fewer_workers(task, view.can_hold) is None:
                view.choose_request(task)
