"""Levels and slots: who goes where, who moves, and that nobody moves for nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_ray.scheduling.matching import Level, Slot, bound, match, to_move

FAST, SLOW = Slot("fast", 4.0), Slot("slow", 1.0)


def running(task_id: str, tokens: float, node_id: str, movable: bool = True) -> Level:
    return Level(task_id, tokens, node_id, movable)


def test_the_bound_is_the_larger_of_all_work_and_of_the_longest_tasks() -> None:
    assert bound([1, 1, 1, 1], [1, 1, 0.5, 0.25]) == pytest.approx(4 / 2.75)
    assert bound([100, 1], [4, 4, 4]) == 25.0, "one task cannot be on two machines"
    assert bound([6, 6, 6], [4, 2]) == 3.0
    assert bound([], [1]) == 0.0
    assert bound([1], []) == float("inf")


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=6), st.lists(st.floats(0.1, 10), min_size=1, max_size=6))
def test_more_work_and_fewer_machines_never_lower_the_bound(levels: list[float], speeds: list[float]) -> None:
    assert bound([*levels, 1.0], speeds) >= bound(levels, speeds)
    assert bound(levels, [*speeds, 1.0]) <= bound(levels, speeds)


def test_the_longest_goes_to_the_fastest() -> None:
    waiting = [Level("short", 1), Level("long", 9), Level("middle", 5)]
    slots = [SLOW, Slot("fast", 4.0), Slot("middling", 2.0)]
    nodes = {task_id: slot.node_id for task_id, slot in match(waiting, slots, {}).items()}
    assert nodes == {"long": "fast", "middle": "middling", "short": "slow"}
    assert match(waiting, [FAST], {}) == {"long": FAST}
    assert match(waiting, [FAST, SLOW], {"long": frozenset({"fast"})}) == {"long": SLOW, "middle": FAST}


def test_two_tasks_change_places_once_half_way() -> None:
    """Speeds 4 and 1, 40 tokens each: both are done after 16 seconds if they change at 8, and not before then."""
    early = [running("a", 40 - 4 * 5, "fast"), running("b", 40 - 5, "slow")]
    assert to_move(early, [FAST, SLOW], cost=0.01) == []
    half_way = [running("a", 40 - 4 * 8, "fast"), running("b", 40 - 8, "slow")]
    assert set(to_move(half_way, [FAST, SLOW], cost=0.01)) == {"a", "b"}
    assert to_move(half_way, [FAST, SLOW], cost=100.0) == [], "not where moving costs more than it saves"
    nearly = [running("a", 40 - 4 * 9.9, "fast"), running("b", 40 - 9.9, "slow")]
    assert to_move(nearly, [FAST, SLOW], cost=0.2) == [], "the fast slot falls free by itself in a moment"
    fresh = [running("a", 8, "fast"), running("b", 32, "slow", movable=False)]
    assert to_move(fresh, [FAST, SLOW], cost=0.01) == [], "not straight after it has begun"


def test_what_waits_takes_the_place_of_what_can_wait() -> None:
    slots = [Slot("one", 1.0), Slot("two", 1.0)]
    tasks = [running("a", 50, "one"), running("b", 40, "two"), Level("waits", 90)]
    assert to_move(tasks, slots, cost=0.1) == ["b"], "90 seconds of the 90 that are left at best"
    assert to_move([tasks[0], tasks[1], Level("waits", 60)], slots, cost=0.1) == []


def test_a_faster_slot_that_falls_free_is_moved_to_where_that_pays() -> None:
    assert to_move([running("a", 40, "slow")], [FAST, SLOW], cost=1.0) == ["a"]
    assert to_move([running("a", 40, "slow")], [FAST, SLOW], cost=25.0) == [], "30 seconds saved, 25 lost: no margin"
    assert to_move([running("a", 40, "slow"), Level("waits", 5)], [FAST, SLOW], cost=1.0) == ["a"]
    short = [running("a", 5, "slow"), Level("waits", 400)]
    assert to_move(short, [FAST, SLOW], cost=1.0) == [], "the fast slot is for the one that waits"


def test_equal_machines_are_no_reason_to_move() -> None:
    slots = [Slot(str(number), 1.0 - 0.001 * number) for number in range(3)]
    tasks = [running(str(number), 10.0 * (number + 1), str(number)) for number in range(3)]
    assert to_move(tasks, slots, cost=0.01) == []
