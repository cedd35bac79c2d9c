"""The nodes of the cluster during one controller step, and the capacity that the step assigns."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from bam_ray.errors import PlacementError
from bam_ray.pipeline.tasks import Task
from bam_ray.scheduling.nodes import (
    UNLIMITED,
    NodeFacts,
    count_fitting,
    describe_request,
    ray_resources,
    satisfiable_request,
    selects,
    without_fallbacks,
    worker_capacity,
)
from bam_ray.scheduling.throughput import ThroughputGroup
from bam_ray.settings import Demand, Needs

_Key = tuple[float, float, float, tuple[tuple[str, str], ...]]  # equal for equal resource requests


@dataclass(frozen=True)
class ChosenRequest:
    """The resource request of a task that the cluster can satisfy."""

    needs: Needs  # without fallbacks
    group: ThroughputGroup
    message: str  # why a fallback was chosen; empty for the first choice


class ClusterView:
    """The nodes of a cluster and their free capacity, counted in workers for each resource request.

    `reserve`, `reserve_any` and `withhold` take capacity from this view; all other methods only answer questions. The
    launcher and the cluster do not see the reservations.
    """

    def __init__(self, nodes: Sequence[NodeFacts]) -> None:
        self.nodes = {node.id: node for node in nodes}
        self._free = {node.id: dict(node.free) for node in nodes}
        self._capacities: dict[_Key, tuple[dict[str, float], dict[str, int]]] = {}
        self._fitting: dict[_Key, list[NodeFacts]] = {}
        self._chosen: dict[tuple[_Key, tuple[_Key, ...], str, int], ChosenRequest] = {}

    def choose_request(self, task: Task) -> ChosenRequest:
        """Return the first resource request of `task` that the idle nodes could satisfy for all workers.

        Raises:
            PlacementError: The nodes can satisfy none of them.
        """
        key = _key(task.needs), tuple(map(_key, task.needs.fallback)), task.model, task.workers
        if key not in self._chosen:
            demand, message = satisfiable_request(task, list(self.nodes.values()))
            group = task.model, describe_request(demand)
            self._chosen[key] = ChosenRequest(without_fallbacks(demand), group, message)
        return self._chosen[key]

    def can_hold(self, task: Task) -> bool:
        """Return True if the nodes could hold all workers of `task` if they were idle."""
        try:
            self.choose_request(task)
        except PlacementError:
            return False
        return True

    def fitting_nodes(self, needs: Needs) -> list[NodeFacts]:
        """Return the nodes that could hold a worker if they were idle, without those that will be taken away."""
        key = _key(needs)
        if key not in self._fitting:
            wanted, labels = ray_resources(needs), needs.labels
            staying = [node for node in self.nodes.values() if not node.leaving]
            selected = [node for node in staying if selects(labels, node.labels)]
            self._fitting[key] = [node for node in selected if count_fitting(wanted, node.resources)]
        return self._fitting[key]

    def free_capacity(self, needs: Needs) -> dict[str, int]:
        """Return how many more workers each node can hold now, by node id, without full nodes."""
        return {node_id: count for node_id, count in self._capacity(needs).items() if count > 0}

    def nodes_to_avoid(
        self, needs: Needs, avoid: frozenset[str], workers: int = 1, wait: bool = False
    ) -> frozenset[str]:
        """Return `avoid` if the other nodes are enough for `workers`, else an empty set.

        The other nodes are enough if they have the capacity now, or, with `wait`, if they had it when idle.
        """
        if not avoid:
            return avoid
        others = [node for node in self.fitting_nodes(needs) if node.id not in avoid]
        if wait:
            capacity = worker_capacity(needs, others, workers)
        else:
            free = self.free_capacity(needs)
            capacity = sum(free.get(node.id, 0) for node in others)
        return avoid if capacity >= workers else frozenset()

    def reserve(self, node_id: str, needs: Needs) -> None:
        """Reserve capacity for one worker on a node."""
        free = self._free[node_id]
        for name, amount in ray_resources(needs).items():
            free[name] = free.get(name, 0.0) - amount
        for wanted, capacities in self._capacities.values():
            if wanted and node_id in capacities:
                capacities[node_id] = count_fitting(wanted, free)

    def withhold(self, node_ids: Iterable[str]) -> None:
        """Reserve all free capacity of the nodes."""
        for node_id in node_ids:
            self._free[node_id] = {}
            for _, capacities in self._capacities.values():
                if node_id in capacities:
                    capacities[node_id] = 0

    def reserve_any(self, needs: Needs, avoid: Collection[str] = ()) -> bool:
        """Reserve capacity for one worker on the emptiest node outside `avoid`; return False if there is none."""
        capacities = self._capacity(needs)
        candidates = (node_id for node_id in capacities if node_id not in avoid)
        best = max(candidates, key=capacities.__getitem__, default=None)
        if best is None or capacities[best] < 1:
            return False
        self.reserve(best, needs)
        return True

    def _capacity(self, needs: Needs) -> dict[str, int]:
        key = _key(needs)
        if key not in self._capacities:
            wanted = ray_resources(needs)
            most = UNLIMITED if wanted else 1
            counts = {node.id: count_fitting(wanted, self._free[node.id], most) for node in self.fitting_nodes(needs)}
            self._capacities[key] = wanted, counts
        return self._capacities[key][1]


def _key(demand: Demand) -> _Key:
    return demand.cpus, demand.gpus, demand.memory_gib or 0.0, tuple(demand.labels.items())
