"""Matching of tasks with slots: first assignments, and moves that pay for themselves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_ray.scheduling.matching import Level, Slot, bound, choose_moves, match

FAST, SLOW = Slot("fast", 4.0), Slot("slow", 1.0)


def running(task_id: str, tokens: float, node_id: str, movable: bool = True) -> Level:
    return Level(task_id, tokens, node_id, movable)


def test_the_bound_covers_all_work_and_the_longest_tasks() -> None:
    assert bound([1, 1, 1, 1], [1, 1, 0.5, 0.25]) == pytest.approx(4 / 2.75)
    assert bound([100, 1], [4, 4, 4]) == 25.0, "one task cannot be on two machines"
    assert bound([6, 6, 6], [4, 2]) == 3.0
    assert bound([], [1]) == 0.0
    assert bound([1], []) == float("inf")


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=6), st.lists(st.floats(0.1, 10), min_size=1, max_size=6))
def test_more_work_or_fewer_machines_never_lower_the_bound(levels: list[float], speeds: list[float]) -> None:
    assert bound([*levels, 1.0], speeds) >= bound(levels, speeds)
    assert bound(levels, [*speeds, 1.0]) <= bound(levels, speeds)


def test_the_longest_task_gets_the_fastest_slot() -> None:
    waiting = [Level("short", 1), Level("long", 9), Level("middle", 5)]
    slots = [SLOW, Slot("fast", 4.0), Slot("middling", 2.0)]
    nodes = {task_id: slot.node_id for task_id, slot in match(waiting, slots, {}).items()}
    assert nodes == {"long": "fast", "middle": "middling", "short": "slow"}
    assert match(waiting, [FAST], {}) == {"long": FAST}
    assert match(waiting, [FAST, SLOW], {"long": frozenset({"fast"})}) == {"long": SLOW, "middle": FAST}


def test_two_tasks_swap_slots_once_and_halfway() -> None:
    """With speeds 4 and 1 and 40 tokens each, both tasks end after 16 seconds if they swap after 8 seconds."""
    early = [running("a", 40 - 4 * 5, "fast"), running("b", 40 - 5, "slow")]
    assert choose_moves(early, [FAST, SLOW], cost=0.01) == []
    halfway = [running("a", 40 - 4 * 8, "fast"), running("b", 40 - 8, "slow")]
    assert set(choose_moves(halfway, [FAST, SLOW], cost=0.01)) == {"a", "b"}
    assert choose_moves(halfway, [FAST, SLOW], cost=100.0) == [], "the moves would cost more than they save"
    nearly = [running("a", 40 - 4 * 9.9, "fast"), running("b", 40 - 9.9, "slow")]
    assert choose_moves(nearly, [FAST, SLOW], cost=0.2) == [], "the fast slot is about to be free"
    fresh = [running("a", 8, "fast"), running("b", 32, "slow", movable=False)]
    assert choose_moves(fresh, [FAST, SLOW], cost=0.01) == [], "a task that has just started does not move"


def test_a_long_waiting_task_replaces_the_shortest_running_task() -> None:
    slots = [Slot("one", 1.0), Slot("two", 1.0)]
    tasks = [running("a", 50, "one"), running("b", 40, "two"), Level("waits", 90)]
    assert choose_moves(tasks, slots, cost=0.1) == ["b"], "it needs all of the 90 seconds that are left"
    assert choose_moves([tasks[0], tasks[1], Level("waits", 60)], slots, cost=0.1) == []


def test_a_task_moves_to_a_free_faster_slot_if_that_pays_off() -> None:
    assert choose_moves([running("a", 40, "slow")], [FAST, SLOW], cost=1.0) == ["a"]
    assert choose_moves([running("a", 40, "slow")], [FAST, SLOW], cost=25.0) == [], (
        "saving 30 seconds at a cost of 25 is within the margin"
    )
    assert choose_moves([running("a", 40, "slow"), Level("waits", 5)], [FAST, SLOW], cost=1.0) == ["a"]
    short = [running("a", 5, "slow"), Level("waits", 400)]
    assert choose_moves(short, [FAST, SLOW], cost=1.0) == [], "the fast slot is for the waiting task"


def test_no_task_moves_between_equally_fast_slots() -> None:
    slots = [Slot(str(number), 1.0 - 0.001 * number) for number in range(3)]
    tasks = [running(str(number), 10.0 * (number + 1), str(number)) for number in range(3)]
    assert choose_moves(tasks, slots, cost=0.01) == []
