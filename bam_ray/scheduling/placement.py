"""Where tasks that train alone should go, and which should move: `matching` over one snapshot, group by group.

Tasks of one group (same model, same demand) are matched with the slots of the nodes that can hold them. Until a speed
has been measured for a group its tasks go wherever there is room.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bam_ray.pipeline.states import Draining, History, Placing, Running
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.cluster_view import Snapshot
from bam_ray.scheduling.matching import Level, Slot, match, to_move
from bam_ray.scheduling.throughput import Group, Speeds
from bam_ray.settings import Needs

AMORTISED = 2.0  # a task moves only when it has trained this many times what moving costs


@dataclass
class _Members:
    """The unfinished tasks of one group."""

    needs: Needs
    waiting: dict[str, tuple[Task, Level]] = field(default_factory=dict)
    active: dict[str, Level] = field(default_factory=dict)
    leaving: dict[str, Level] = field(default_factory=dict)
    history: dict[str, History] = field(default_factory=dict)


class Placement:
    """Fill with what is unfinished, then ask."""

    def __init__(self, snapshot: Snapshot, speeds: Speeds, now: float, kinds: Mapping[str, str]) -> None:
        self._snapshot = snapshot
        self._speeds = speeds
        self._now = now
        self._kinds = kinds
        self._groups: dict[Group, _Members] = {}

    def add_active(self, task: Task, group: Group, state: Placing | Running | Draining) -> None:
        """One that a node has, or is meant to have; `task` with the demand that was taken."""
        members = self._groups.setdefault(group, _Members(task.needs))
        node_id = state.node_id if isinstance(state, Placing) else state.node.id if state.node else None
        if node_id is None:  # in the launcher's queue: it will take some room
            self._snapshot.take_any(task.needs)
            return
        node = self._snapshot.nodes.get(node_id)
        if node is None or node.leaving:  # it died, which will soon be seen, or will
            return
        level = Level(task.id, _tokens(task, state.progress), node_id, self._may_move(group, state))
        if isinstance(state, Draining):
            members.leaving[task.id] = level
        else:
            members.active[task.id] = level

    def add_waiting(self, task: Task, progress: Progress | None, history: History) -> None:
        """One that is ready; raises `PlacementError` where no node can ever hold it."""
        taken = self._snapshot.taken(task)
        members = self._groups.setdefault(taken.group, _Members(taken.needs))
        members.waiting[task.id] = task, Level(task.id, _tokens(task, progress))
        members.history[task.id] = history

    def to_move(self) -> list[str]:
        """Running tasks that should leave their nodes."""
        moving: list[str] = []
        for group, members in self._groups.items():
            slots = self._slots(group, members, in_use=True)
            if slots:
                away = [Level(level.task_id, level.tokens) for level in members.leaving.values()]
                waiting = [level for _, level in members.waiting.values()]
                levels = [*members.active.values(), *away, *waiting]
                moving += to_move(levels, slots, self._speeds.cost(group))
        return moving

    def leaves(self, task_id: str) -> None:
        """It has been asked to."""
        for members in self._groups.values():
            if task_id in members.active:
                members.leaving[task_id] = members.active.pop(task_id)

    def to_place(self) -> Iterator[tuple[Task, str | None, frozenset[str]]]:
        """What should begin now, and on which node; None: on any with room, off those that come third."""
        for group, members in self._groups.items():
            if not self._snapshot.free(members.needs):
                continue
            if self._slots(group, members, in_use=False):
                yield from self._matched(group, members)
            else:
                yield from self._anywhere(members)

    def _matched(self, group: Group, members: _Members) -> Iterator[tuple[Task, str, frozenset[str]]]:
        """The longest to the fastest; a task that is leaving, and its room, count as if it had left."""
        free = self._snapshot.free(members.needs)
        levels = [*(level for _, level in members.waiting.values()), *members.leaving.values()]
        avoid = {task_id: self._spared(task_id, members) for task_id in members.waiting}
        matched = match(levels, self._slots(group, members, in_use=False), avoid)
        for task_id, slot in matched.items():
            if task_id in members.waiting and free.get(slot.node_id, 0) > 0:
                free[slot.node_id] -= 1
                self._snapshot.take(slot.node_id, members.needs)
                yield members.waiting[task_id][0], slot.node_id, frozenset()

    def _anywhere(self, members: _Members) -> Iterator[tuple[Task, None, frozenset[str]]]:
        for task, _ in sorted(members.waiting.values(), key=lambda each: each[1].tokens, reverse=True):
            avoid = self._spared(task.id, members)
            if self._snapshot.take_any(members.needs, avoid):
                yield task, None, avoid
            elif not avoid:
                return

    def _slots(self, group: Group, members: _Members, in_use: bool) -> list[Slot]:
        """Room that is free or becomes so, or (`in_use`) all room of this group; empty where nothing was measured."""
        fitting = self._snapshot.fitting(members.needs)
        speeds = self._speeds.expected(group, {node.kind for node in fitting})
        if not speeds:
            return []
        counts: dict[str, int] = defaultdict(int, self._snapshot.free(members.needs))
        for level in [*members.leaving.values(), *(members.active.values() if in_use else ())]:
            assert level.node_id is not None
            counts[level.node_id] += 1
        return [
            Slot(node_id, speeds[self._kinds[node_id]])
            for node_id, count in counts.items()
            if self._kinds[node_id] in speeds
            for _ in range(count)
        ]

    def _spared(self, task_id: str, members: _Members) -> frozenset[str]:
        """Nodes that a waiting task should not go to now."""
        history = members.history[task_id]
        return self._snapshot.spared(members.needs, history.avoid, wait=history.would_wait)

    def _may_move(self, group: Group, state: Placing | Running | Draining) -> bool:
        if not isinstance(state, Running) or state.steps_per_second is None:
            return False
        return self._now - state.since > AMORTISED * self._speeds.cost(group)


def _tokens(task: Task, progress: Progress | None) -> float:
    return float(task.remaining_steps(progress) * task.step_tokens)
