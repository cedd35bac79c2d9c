"""Placement by speed of the tasks that train alone: which node each starts on, and which running task moves.

Tasks of one throughput group (equal models and resource requests) are matched with the slots of the nodes that can hold
them. Until the speed of a group has been measured, its tasks start on any node with capacity.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bam_ray.pipeline.states import Active, Draining, History, Placing, Running
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.cluster_view import ClusterView
from bam_ray.scheduling.matching import Level, Slot, choose_moves, match
from bam_ray.scheduling.throughput import ThroughputGroup, ThroughputTracker
from bam_ray.settings import Needs

AMORTIZED = 2.0  # a task moves only after it has trained for this many times the cost of a move


@dataclass
class _Members:
    """The unfinished tasks of one throughput group, by task id."""

    needs: Needs
    waiting: dict[str, tuple[Task, Level]] = field(default_factory=dict)
    active: dict[str, Level] = field(default_factory=dict)
    leaving: dict[str, Level] = field(default_factory=dict)
    history: dict[str, History] = field(default_factory=dict)  # of the waiting tasks


class SpeedPlacement:
    """One placement over one view of the cluster: add all unfinished tasks, then ask which move and which start.

    Args:
        view: The cluster; `starts` reserves capacity in it.
        throughput: The measured speeds and costs.
        now: The time on the controller's clock.
        kinds: The kinds of all known nodes, by node id.
    """

    def __init__(self, view: ClusterView, throughput: ThroughputTracker, now: float, kinds: Mapping[str, str]) -> None:
        self._view = view
        self._throughput = throughput
        self._now = now
        self._kinds = kinds
        self._groups: dict[ThroughputGroup, _Members] = {}

    def add_active(self, task: Task, group: ThroughputGroup, state: Active) -> None:
        """Add a task with an attempt; `task.needs` is the resource request that was chosen for it."""
        members = self._members(group, task.needs)
        node_id = state.node_id if isinstance(state, Placing) else state.node.id if state.node else None
        if node_id is None:  # it is in the launcher's queue and will take capacity on some node
            self._view.reserve_any(task.needs)
            return
        node = self._view.nodes.get(node_id)
        if node is None or node.leaving:  # the node has died, which the launcher will report soon, or will be gone soon
            return
        level = Level(task.id, _tokens(task, state.progress), node_id, self._may_move(group, state))
        if isinstance(state, Draining):
            members.leaving[task.id] = level
        else:
            members.active[task.id] = level

    def add_waiting(self, task: Task, progress: Progress | None, history: History) -> None:
        """Add a task that can start; raise `PlacementError` if no node can ever hold it."""
        request = self._view.choose_request(task)
        members = self._members(request.group, request.needs)
        members.waiting[task.id] = task, Level(task.id, _tokens(task, progress))
        members.history[task.id] = history

    def moves(self) -> list[str]:
        """Return the ids of running tasks that should leave their nodes now."""
        moving: list[str] = []
        for group, members in self._groups.items():
            slots = self._slots(group, members, in_use=True)
            if slots:
                away = [Level(level.task_id, level.tokens) for level in members.leaving.values()]
                waiting = [level for _, level in members.waiting.values()]
                levels = [*members.active.values(), *away, *waiting]
                moving += choose_moves(levels, slots, self._throughput.move_cost(group))
        return moving

    def mark_leaving(self, task_id: str) -> None:
        """Treat a running task as one that leaves its node."""
        for members in self._groups.values():
            if task_id in members.active:
                members.leaving[task_id] = members.active.pop(task_id)

    def starts(self) -> Iterator[tuple[Task, str | None, frozenset[str]]]:
        """Yield (task, node id, avoid) for each task to start now.

        A node id of None means any node with capacity that is not in `avoid`.
        """
        for group, members in self._groups.items():
            if not self._view.free_capacity(members.needs):
                continue
            if self._slots(group, members, in_use=False):
                yield from self._matched(group, members)
            else:
                yield from self._anywhere(members)

    def _members(self, group: ThroughputGroup, needs: Needs) -> _Members:
        if group not in self._groups:
            self._groups[group] = _Members(needs)
        return self._groups[group]

    def _matched(self, group: ThroughputGroup, members: _Members) -> Iterator[tuple[Task, str, frozenset[str]]]:
        """Match the longest tasks with the fastest slots, as if the leaving tasks had left their nodes already."""
        free = self._view.free_capacity(members.needs)
        levels = [*(level for _, level in members.waiting.values()), *members.leaving.values()]
        avoid = {task_id: self._nodes_to_avoid(task_id, members) for task_id in members.waiting}
        matched = match(levels, self._slots(group, members, in_use=False), avoid)
        for task_id, slot in matched.items():
            if task_id in members.waiting and free.get(slot.node_id, 0) > 0:
                free[slot.node_id] -= 1
                self._view.reserve(slot.node_id, members.needs)
                yield members.waiting[task_id][0], slot.node_id, frozenset()

    def _anywhere(self, members: _Members) -> Iterator[tuple[Task, None, frozenset[str]]]:
        for task, _ in sorted(members.waiting.values(), key=lambda each: each[1].tokens, reverse=True):
            avoid = self._nodes_to_avoid(task.id, members)
            if self._view.reserve_any(members.needs, avoid):
                yield task, None, avoid
            elif not avoid:
                return

    def _slots(self, group: ThroughputGroup, members: _Members, in_use: bool) -> list[Slot]:
        """Return the slots that are free or about to be, or with `in_use` all slots of the group.

        The list is empty if no speed has been measured for the group.
        """
        fitting = self._view.fitting_nodes(members.needs)
        speeds = self._throughput.expected_rates(group, {node.kind for node in fitting})
        if not speeds:
            return []
        counts: dict[str, int] = defaultdict(int, self._view.free_capacity(members.needs))
        for level in [*members.leaving.values(), *(members.active.values() if in_use else ())]:
            assert level.node_id is not None
            counts[level.node_id] += 1
        return [
            Slot(node_id, speeds[self._kinds[node_id]])
            for node_id, count in counts.items()
            if self._kinds[node_id] in speeds
            for _ in range(count)
        ]

    def _nodes_to_avoid(self, task_id: str, members: _Members) -> frozenset[str]:
        history = members.history[task_id]
        return self._view.nodes_to_avoid(members.needs, history.avoid, wait=history.waits_for_other_nodes)

    def _may_move(self, group: ThroughputGroup, state: Active) -> bool:
        if not isinstance(state, Running) or state.steps_per_second is None:
            return False
        return self._now - state.measured_from > AMORTIZED * self._throughput.move_cost(group)


def _tokens(task: Task, progress: Progress | None) -> float:
    return float(task.remaining_steps(progress) * task.step_tokens)
