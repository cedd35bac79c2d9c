"""Which task should work on which node, by how much is left of each and how fast each node is: pure functions.

The problem is old: independent tasks that can be interrupted, machines of different speed, all done as early as can
be. No schedule ends before

    bound = max( sum of work / sum of speeds,  max over m of (m longest tasks) / (m fastest machines) )

and always giving the longest to the fastest reaches it (Horvath, Lam and Sethi, "A level algorithm for preemptive
scheduling", JACM 24, 1977), but moves tasks without end. Moves cost a checkpoint and a start here, so a task is moved
only once that cannot be put off: an m is *tight* when its m longest tasks need its m fastest machines from now on, all
of them, to be done within the bound. While none is tight nothing needs to move. (That this comes out at the bound as
well, with few moves, is the idea of Gonzalez and Sahni, "Preemptive scheduling of uniform processor systems", JACM 25,
1978; theirs is made beforehand, this one again at every look, for speeds and machines change.)

Work is in tokens, speed in tokens a second, cost in seconds. A *slot* is room for one task on a node.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LOOKAHEAD = 0.02  # of the bound: how far ahead of being tight an m is taken for tight
APART = 0.25  # of the time that is left: how far apart two tasks are at least that change places
WORTH = 1.5  # a move must save this many times what it costs
SAME_SPEED = 0.97  # slots are of one class where the slower has at least this part of the faster's speed


@dataclass(frozen=True)
class Slot:
    """Room for one task."""

    node_id: str
    speed: float


@dataclass(frozen=True)
class Level:
    """A task that is not finished: how much is left of it, and where it is."""

    task_id: str
    tokens: float
    node_id: str | None = None  # None: it waits
    movable: bool = True


@dataclass(frozen=True)
class Floor:
    """How much more must be left of a task than of the one whose faster slot it takes."""

    cost: float
    limit: float  # seconds that are left, at best

    def tokens(self, faster: float, slower: float) -> float:
        """Enough to make up for both standing still, and to last for a part of the time that is left."""
        return max(WORTH * self.cost * (faster + slower), APART * self.limit * (faster - slower))

    def ends_soon(self, task: Level, slot: Slot) -> bool:
        """Whether waiting for a slot is cheaper than taking it."""
        return task.tokens < WORTH * self.cost * slot.speed


def bound(levels: Sequence[float], speeds: Sequence[float]) -> float:
    """Seconds before which no schedule can have done all of `levels` on machines of `speeds`."""
    work, speed, most = 0.0, 0.0, 0.0
    fastest = sorted(speeds, reverse=True)
    for m, level in enumerate(sorted(levels, reverse=True)):
        work += level
        speed += fastest[m] if m < len(fastest) else 0.0
        if work:
            most = max(most, work / speed if speed else float("inf"))
    return most


def to_move(tasks: Sequence[Level], slots: Sequence[Slot], cost: float) -> list[str]:
    """Ids of running tasks that should write a checkpoint and leave their nodes now.

    `slots` are all there are, in use or not. What has left is then placed by `match` together with what waits.
    """
    order = sorted(tasks, key=lambda task: task.tokens, reverse=True)
    slots = sorted(slots, key=lambda slot: slot.speed, reverse=True)
    seats = _seat(order, slots)
    limit = bound([task.tokens for task in order], [slot.speed for slot in slots])
    floor = Floor(cost, limit)
    leaving: dict[str, None] = {}
    for first, last in _classes(slots):
        tight = _tight(order, slots, first, last, limit)
        if tight:
            # The fewest must have all faster slots, the most must have a slot of this class at least
            _swap(order[: tight[0]], slots, first, seats, leaving, floor)
            _swap(order[: tight[-1]], slots, last, seats, leaving, floor)
    if all(task.node_id for task in order):
        _climb(slots, seats, leaving, cost)
    return list(leaving)


def match(waiting: Sequence[Level], slots: Sequence[Slot], avoid: Mapping[str, frozenset[str]]) -> dict[str, Slot]:
    """The longest to the fastest: a slot by task id, for as many as there are slots.

    `avoid`: nodes that a task should not go to, by its id.
    """
    free = sorted(slots, key=lambda slot: slot.speed, reverse=True)
    matched: dict[str, Slot] = {}
    for task in sorted(waiting, key=lambda task: task.tokens, reverse=True) if free else ():
        shunned = avoid.get(task.task_id, frozenset())
        for place, slot in enumerate(free):
            if slot.node_id not in shunned:
                matched[task.task_id] = free.pop(place)
                break
    return matched


def _seat(order: Sequence[Level], slots: Sequence[Slot]) -> dict[int, Level]:
    """Who sits where now: running tasks by the number of their slot."""
    open_slots: dict[str, list[int]] = {}
    for number in reversed(range(len(slots))):
        open_slots.setdefault(slots[number].node_id, []).append(number)
    seats: dict[int, Level] = {}
    for task in order:
        if task.node_id and open_slots.get(task.node_id):
            seats[open_slots[task.node_id].pop()] = task
    return seats


def _classes(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """Ranges of slots that are equally fast: moving within one would gain nothing."""
    ranges: list[tuple[int, int]] = []
    first = 0
    for number in range(1, len(slots) + 1):
        if number == len(slots) or slots[number].speed < SAME_SPEED * slots[first].speed:
            ranges.append((first, number))
            first = number
    return ranges


def _tight(order: Sequence[Level], slots: Sequence[Slot], first: int, last: int, limit: float) -> list[int]:
    """Every m in (first, last] whose longest tasks need its fastest slots from now on."""
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
    seats: dict[int, Level],
    leaving: dict[str, None],
    floor: "Floor",
) -> None:
    """Bring the `needed` tasks to the first `last` slots, where that is worth it; `seats` becomes as it will be."""
    wanted = {task.task_id for task in needed}
    seat_of = {task.task_id: number for number, task in seats.items()}
    coming = [task for task in needed if seat_of.get(task.task_id, last) >= last]
    empty = [number for number in range(last) if number not in seats]
    others = [
        number
        for number in range(last)
        if number in seats and seats[number].task_id not in wanted and not floor.ends_soon(seats[number], slots[number])
    ]
    others.sort(key=lambda number: seats[number].tokens)
    for task in coming:
        origin = seat_of.get(task.task_id)
        speed = slots[origin].speed if origin is not None else 0.0
        if not task.movable:
            continue
        if empty:
            if origin is not None and not _pays(task.tokens, speed, slots[empty[0]].speed, floor.cost):
                continue
            number = empty.pop(0)
        elif others:
            number = others.pop(0)
            gone = seats[number]
            if not gone.movable or task.tokens - gone.tokens < floor.tokens(slots[number].speed, speed):
                continue
            leaving[gone.task_id] = None
            del seats[number]
            if origin is not None:
                seats[origin] = gone
        else:
            break
        if origin is not None:
            leaving[task.task_id] = None
            if seats.get(origin) is task:
                del seats[origin]
        seats[number] = task


def _climb(slots: Sequence[Slot], seats: dict[int, Level], leaving: dict[str, None], cost: float) -> None:
    """Nothing waits: what runs moves up to faster slots that stand empty, where that pays for itself."""
    for number, slot in enumerate(slots):
        if number in seats:
            continue
        slower = [(origin, task) for origin, task in seats.items() if origin > number and task.movable]
        paying = [
            (task.tokens / slots[origin].speed, origin, task)
            for origin, task in slower
            if task.task_id not in leaving and _pays(task.tokens, slots[origin].speed, slot.speed, cost)
        ]
        if paying:
            _, origin, task = max(paying, key=lambda each: each[:2])
            leaving[task.task_id] = None
            del seats[origin]
            seats[number] = task


def _pays(tokens: float, speed: float, faster: float, cost: float) -> bool:
    """Whether moving on to a `faster` slot that is empty ends sooner, with a margin."""
    return tokens / speed > tokens / faster + WORTH * cost
