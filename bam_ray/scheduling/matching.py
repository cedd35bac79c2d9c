"""Matching of tasks with nodes by remaining work and node speed: pure functions.

The problem is a classic one: independent tasks that can be preempted, machines of different speeds, and the earliest
time at which all tasks are done. No schedule is shorter than

    bound = max( sum of work / sum of speeds,  max over m of (m longest tasks) / (m fastest machines) )

A schedule that always gives the longest task to the fastest machine reaches this bound (Horvath, Lam and Sethi, "A
level algorithm for preemptive scheduling", JACM 24, 1977), but it moves tasks without end. Here a move costs a
checkpoint and a start, so a task moves only when the move cannot be postponed. A number m is *tight* if the m longest
tasks need the m fastest machines, all of them, from now on to be done within the bound. While no m is tight, no task
needs to move. This reaches the bound too, with few moves. The idea comes from Gonzalez and Sahni, "Preemptive
scheduling of uniform processor systems", JACM 25, 1978. They compute the schedule in advance; here it is computed again
at each controller step, because speeds and machines change.

Work is in tokens, speed in tokens per second, cost in seconds. A *slot* is the capacity for one task on a node.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LOOKAHEAD = 0.02  # m counts as tight this fraction of the bound early
SWAP_FRACTION = 0.25  # two tasks swap only if their finish times differ by this fraction of the remaining time
MOVE_MARGIN = 1.5  # a move must save this many times its cost
SAME_SPEED = 0.97  # slots are of one speed class if the slower has at least this fraction of the faster one's speed


@dataclass(frozen=True)
class Slot:
    """The capacity for one task on a node."""

    node_id: str
    speed: float


@dataclass(frozen=True)
class Level:
    """The level of an unfinished task: its remaining work, as the level algorithm calls it; and its node."""

    task_id: str
    tokens: float
    node_id: str | None = None  # None: the task waits for a node
    movable: bool = True


@dataclass(frozen=True)
class SwapThreshold:
    """The least difference in remaining work for which a task may take the faster slot of another."""

    cost: float  # seconds of a move
    bound: float  # seconds until all tasks are done at best

    def tokens(self, faster: float, slower: float) -> float:
        """Return the difference that makes up for two idle slots and keeps the tasks apart for a while."""
        return max(MOVE_MARGIN * self.cost * (faster + slower), SWAP_FRACTION * self.bound * (faster - slower))

    def ends_soon(self, task: Level, slot: Slot) -> bool:
        """Return True if it costs less to wait until `task` leaves its slot than to take the slot."""
        return task.tokens < MOVE_MARGIN * self.cost * slot.speed


def bound(levels: Sequence[float], speeds: Sequence[float]) -> float:
    """Return the least number of seconds in which any schedule can do all of `levels` on machines of `speeds`."""
    work, speed, longest = 0.0, 0.0, 0.0
    fastest = sorted(speeds, reverse=True)
    for m, level in enumerate(sorted(levels, reverse=True)):
        work += level
        speed += fastest[m] if m < len(fastest) else 0.0
        if work:
            longest = max(longest, work / speed if speed else float("inf"))
    return longest


def choose_moves(tasks: Sequence[Level], slots: Sequence[Slot], cost: float) -> list[str]:
    """Return the ids of the running tasks that should write a checkpoint and leave their nodes now.

    Once they have left, `match` places them together with the waiting tasks.

    Args:
        tasks: All unfinished tasks.
        slots: All slots, in use or free.
        cost: The seconds of a move.
    """
    order = sorted(tasks, key=lambda task: task.tokens, reverse=True)
    slots = sorted(slots, key=lambda slot: slot.speed, reverse=True)
    assigned = _current_assignment(order, slots)
    limit = bound([task.tokens for task in order], [slot.speed for slot in slots])
    threshold = SwapThreshold(cost, limit)
    leaving: dict[str, None] = {}
    for first, last in _speed_classes(slots):
        tight = _tight_numbers(order, slots, first, last, limit)
        if tight:
            # The smallest tight number of tasks needs all faster slots, the largest at least slots of this class
            _swap(order[: tight[0]], slots, first, assigned, leaving, threshold)
            _swap(order[: tight[-1]], slots, last, assigned, leaving, threshold)
    if all(task.node_id for task in order):
        _fill_faster_slots(slots, assigned, leaving, cost)
    return list(leaving)


def match(waiting: Sequence[Level], slots: Sequence[Slot], avoid: Mapping[str, frozenset[str]]) -> dict[str, Slot]:
    """Give the fastest slots to the longest tasks.

    Args:
        waiting: The tasks that wait for a slot.
        slots: The free slots.
        avoid: The nodes that a task must not be placed on, by task id.

    Returns:
        The slot of each task that gets one, by task id.
    """
    free = sorted(slots, key=lambda slot: slot.speed, reverse=True)
    matched: dict[str, Slot] = {}
    for task in sorted(waiting, key=lambda task: task.tokens, reverse=True) if free else ():
        avoided = avoid.get(task.task_id, frozenset())
        for index, slot in enumerate(free):
            if slot.node_id not in avoided:
                matched[task.task_id] = free.pop(index)
                break
    return matched


def _current_assignment(order: Sequence[Level], slots: Sequence[Slot]) -> dict[int, Level]:
    """Return the running tasks by the index of their slot."""
    free_indices: dict[str, list[int]] = {}
    for index in reversed(range(len(slots))):
        free_indices.setdefault(slots[index].node_id, []).append(index)
    assigned: dict[int, Level] = {}
    for task in order:
        if task.node_id and free_indices.get(task.node_id):
            assigned[free_indices[task.node_id].pop()] = task
    return assigned


def _speed_classes(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """Return the index ranges of slots of equal speed; a move within a range gains nothing."""
    ranges: list[tuple[int, int]] = []
    first = 0
    for index in range(1, len(slots) + 1):
        if index == len(slots) or slots[index].speed < SAME_SPEED * slots[first].speed:
            ranges.append((first, index))
            first = index
    return ranges


def _tight_numbers(order: Sequence[Level], slots: Sequence[Slot], first: int, last: int, limit: float) -> list[int]:
    """Return every m in (first, last] whose m longest tasks need the m fastest slots from now on."""
    work = sum(task.tokens for task in order[:first])
    speed = sum(slot.speed for slot in slots[:first])
    tight: list[int] = []
    for m in range(first + 1, min(last, len(order)) + 1):
        work += order[m - 1].tokens
        speed += slots[m - 1].speed
        if work >= (1.0 - LOOKAHEAD) * limit * speed:
            tight.append(m)
    return tight


def _swap(
    needed: Sequence[Level],
    slots: Sequence[Slot],
    last: int,
    assigned: dict[int, Level],
    leaving: dict[str, None],
    threshold: SwapThreshold,
) -> None:
    """Bring the `needed` tasks to the first `last` slots if the moves pay off.

    Adds the tasks that must move to `leaving`, and changes `assigned` to the assignment after the moves.
    """
    wanted = {task.task_id for task in needed}
    slot_of = {task.task_id: index for index, task in assigned.items()}
    coming = [task for task in needed if slot_of.get(task.task_id, last) >= last]
    empty = [index for index in range(last) if index not in assigned]
    replaceable = [
        index
        for index in range(last)
        if index in assigned
        and assigned[index].task_id not in wanted
        and not threshold.ends_soon(assigned[index], slots[index])
    ]
    replaceable.sort(key=lambda index: assigned[index].tokens)
    for task in coming:
        origin = slot_of.get(task.task_id)
        speed = slots[origin].speed if origin is not None else 0.0
        if not task.movable:
            continue
        if empty:
            if origin is not None and not _pays_off(task.tokens, speed, slots[empty[0]].speed, threshold.cost):
                continue
            index = empty.pop(0)
        elif replaceable:
            index = replaceable.pop(0)
            replaced = assigned[index]
            if not replaced.movable or task.tokens - replaced.tokens < threshold.tokens(slots[index].speed, speed):
                continue
            leaving[replaced.task_id] = None
            del assigned[index]
            if origin is not None:
                assigned[origin] = replaced
        else:
            break
        if origin is not None:
            leaving[task.task_id] = None
            if assigned.get(origin) is task:
                del assigned[origin]
        assigned[index] = task


def _fill_faster_slots(
    slots: Sequence[Slot], assigned: dict[int, Level], leaving: dict[str, None], cost: float
) -> None:
    """Move running tasks to faster empty slots if the moves pay off; used only if no task waits."""
    for index, slot in enumerate(slots):
        if index in assigned:
            continue
        slower = [(origin, task) for origin, task in assigned.items() if origin > index and task.movable]
        paying = [
            (task.tokens / slots[origin].speed, origin, task)
            for origin, task in slower
            if task.task_id not in leaving and _pays_off(task.tokens, slots[origin].speed, slot.speed, cost)
        ]
        if paying:
            _, origin, task = max(paying, key=lambda each: each[:2])
            leaving[task.task_id] = None
            del assigned[origin]
            assigned[index] = task


def _pays_off(tokens: float, speed: float, faster: float, cost: float) -> bool:
    """Return True if a task ends sooner, by a margin, after a move to an empty slot with the speed `faster`."""
    return tokens / speed > tokens / faster + MOVE_MARGIN * cost
