"""The nodes at one look of the controller, and what of them it gives away while it looks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from bam_ray.control.nodes import MANY, NodeFacts, as_needs, demand_met, fits, resources_of, said_of, selects
from bam_ray.control.speeds import Group
from bam_ray.control.tasks import Task
from bam_ray.errors import PlacementError
from bam_ray.settings.recipe import Needs


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
        """The nodes that could hold a worker if they were idle."""
        wanted = resources_of(needs)
        return [
            node for node in self.nodes.values() if selects(needs.labels, node.labels) and fits(wanted, node.resources)
        ]

    def free(self, needs: Needs, nodes: Collection[NodeFacts]) -> dict[str, int]:
        """How many more workers each of `nodes` has room for now, by id, those with room alone."""
        wanted = resources_of(needs)
        most = MANY if wanted else 1
        rooms = {node.id: fits(wanted, self._free[node.id], most) for node in nodes}
        return {id: count for id, count in rooms.items() if count > 0}

    def take(self, node_id: str, needs: Needs) -> None:
        """Give away room for one worker."""
        free = self._free[node_id]
        for name, amount in resources_of(needs).items():
            free[name] = free.get(name, 0.0) - amount

    def take_any(self, needs: Needs, avoid: Collection[str] = ()) -> bool:
        """Give away room for one worker on the node with the most; False where there is none."""
        rooms = self.free(needs, self.fitting(needs))
        others: Mapping[str, int] = {id: count for id, count in rooms.items() if id not in avoid} or rooms
        if not others:
            return False
        self.take(max(others, key=lambda id: others[id]), needs)
        return True
