"""The nodes at one look of the controller, and what of them it gives away while it looks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bam_ray.errors import PlacementError
from bam_ray.pipeline.tasks import Task
from bam_ray.scheduling.nodes import MANY, NodeFacts, as_needs, demand_met, fits, resources_of, room, said_of, selects
from bam_ray.scheduling.throughput import Group
from bam_ray.settings import Needs

_Key = tuple[float, float, float, tuple[tuple[str, str], ...]]  # what tells demands apart


@dataclass(frozen=True)
class Taken:
    """A demand that the cluster can meet."""

    needs: Needs  # without a fallback
    group: Group
    said: str  # of a fallback


class Snapshot:
    """Free room on nodes, by demand."""

    def __init__(self, nodes: Sequence[NodeFacts]) -> None:
        self.nodes = {node.id: node for node in nodes}
        self._free = {node.id: dict(node.free) for node in nodes}
        self._rooms: dict[_Key, tuple[dict[str, float], dict[str, int]]] = {}
        self._fitting: dict[_Key, list[NodeFacts]] = {}
        self._taken: dict[tuple[int, str, int], Taken] = {}

    def taken(self, task: Task) -> Taken:
        """The demand of `task` that is taken; raises `PlacementError` where none can ever be met."""
        key = id(task.needs), task.model, task.workers
        if key not in self._taken:
            demand, said = demand_met(task, list(self.nodes.values()))
            self._taken[key] = Taken(as_needs(demand), (task.model, said_of(demand)), said)
        return self._taken[key]

    def can_hold(self, task: Task) -> bool:
        """Whether the nodes could hold all workers of `task` if they were idle."""
        try:
            self.taken(task)
        except PlacementError:
            return False
        return True

    def fitting(self, needs: Needs) -> list[NodeFacts]:
        """The nodes that could hold a worker if they were idle, and will stay."""
        if _key(needs) not in self._fitting:
            wanted, labels = resources_of(needs), needs.labels
            staying = [node for node in self.nodes.values() if not node.leaving]
            fitting = [node for node in staying if selects(labels, node.labels) and fits(wanted, node.resources)]
            self._fitting[_key(needs)] = fitting
        return self._fitting[_key(needs)]

    def free(self, needs: Needs) -> dict[str, int]:
        """How many more workers each node has room for now, by id, those with room alone."""
        return {node_id: count for node_id, count in self._rooms_for(needs).items() if count > 0}

    def take(self, node_id: str, needs: Needs) -> None:
        """Give away room for one worker."""
        free = self._free[node_id]
        for name, amount in resources_of(needs).items():
            free[name] = free.get(name, 0.0) - amount
        for wanted, rooms in self._rooms.values():
            if wanted and node_id in rooms:
                rooms[node_id] = fits(wanted, free)

    def spared(self, needs: Needs, avoid: frozenset[str], workers: int = 1, wait: bool = False) -> frozenset[str]:
        """`avoid` where the other nodes have room for `workers` now, or (`wait`) would have if they were idle, else
        nothing."""
        if not avoid:
            return avoid
        others = [node for node in self.fitting(needs) if node.id not in avoid]
        if wait:
            there = room(needs, others, workers)
        else:
            free = self.free(needs)
            there = sum(free.get(node.id, 0) for node in others)
        return avoid if there >= workers else frozenset()

    def take_any(self, needs: Needs, avoid: Collection[str] = ()) -> bool:
        """Give away room for one worker on the node with the most that is not in `avoid`."""
        rooms = self._rooms_for(needs)
        best = max((node_id for node_id in rooms if node_id not in avoid), key=rooms.__getitem__, default=None)
        if best is None or rooms[best] < 1:
            return False
        self.take(best, needs)
        return True

    def _rooms_for(self, needs: Needs) -> dict[str, int]:
        if _key(needs) not in self._rooms:
            wanted = resources_of(needs)
            most = MANY if wanted else 1
            rooms = {node.id: fits(wanted, self._free[node.id], most) for node in self.fitting(needs)}
            self._rooms[_key(needs)] = wanted, rooms
        return self._rooms[_key(needs)][1]


def _key(needs: Needs) -> _Key:
    return needs.cpus, needs.gpus, needs.memory_gib, tuple(needs.labels.items())
