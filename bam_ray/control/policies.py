"""What to do, as pure functions of states: no clock, no store, no launcher.

Retries: an error that would only repeat itself (settings, data, weights that do not fit) fails at once. Everything else
is tried again, at most `Task.max_attempts` times in a row without moving the last checkpoint on: an attempt that got
further than all before it begins the count anew. One whose node died, or that the blob store was away for, does not
count, being no fault of the task: those have a longer patience of their own, each, so that a task on nodes that are
often taken away still ends, and one that brings its nodes down does too.

A quorum is met by the branches that have arrived: at once, or, where there is a deadline, when it has passed or nothing
more can come.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.observations import Broke
from bam_ray.errors import (
    DataError,
    FamilyError,
    LossNotFinite,
    LossSpiked,
    PlacementError,
    SettingsError,
    StaleLease,
    StoreDenied,
    UpcycleError,
)
from bam_ray.pipeline.states import Blocked, Committed, Failed, History, Retrying, State
from bam_ray.pipeline.tasks import Quorum, Task

FINAL = (
    SettingsError,
    DataError,
    StoreDenied,
    StaleLease,
    FamilyError,
    UpcycleError,
    PlacementError,
    LossNotFinite,
    LossSpiked,
)
MAX_PENDING = 32  # placed, but on no node yet: enough to keep nodes busy, few enough that the order stays ours
FIRST_DELAY = 1.0  # seconds before the second attempt; doubles up to:
LONGEST_DELAY = 60.0
MOST_OUTAGES = 16  # attempts in a row for which the store was away: with their delays, ten minutes
MOST_NODE_DEATHS = 16  # attempts that a node died under since the last that got further
PIN_PATIENCE = 120.0  # seconds that a node has to take what was meant for it, before another is looked for
PLACEMENT_DELAY = 15.0  # seconds between looks for a node that can hold a task whose node went away


def is_final(error: BaseException) -> bool:
    """Whether another attempt would end the same way."""
    return isinstance(error, FINAL)


def arrived(quorum: Quorum, states: Mapping[str, State]) -> list[str]:
    """The names of its branches that are committed; `states` are all tasks', by id."""
    return [name for id, name in quorum.branches if isinstance(states[id], Committed)]


def coming(quorum: Quorum, states: Mapping[str, State]) -> int:
    """How many of its branches are neither committed nor failed."""
    return sum(not isinstance(states[id], Committed | Failed | Blocked) for id, _ in quorum.branches)


def enough(quorum: Quorum, states: Mapping[str, State], waited: float) -> bool:
    """Whether to begin with the branches that there are, `waited` seconds after all could."""
    if len(arrived(quorum, states)) < quorum.at_least:
        return False
    return waited >= quorum.deadline or not coming(quorum, states)


def can_meet(quorum: Quorum, states: Mapping[str, State]) -> bool:
    """Whether there are enough branches, or may yet be."""
    return len(arrived(quorum, states)) + coming(quorum, states) >= quorum.at_least


def choose(
    ready: Iterable[Task], pending: int, active: Mapping[ArtifactKind, int], remaining: Callable[[Task], int]
) -> list[Task]:
    """Which ready tasks to place now: the longest first, while not too many wait for a node already.

    `active` counts the tasks of each kind that are placed or running, for `Task.at_once`.
    """
    chosen: list[Task] = []
    together = Counter(active)
    for task in sorted(ready, key=remaining, reverse=True):
        if pending + len(chosen) >= MAX_PENDING:
            break
        if task.at_once is None or together[task.kind] < task.at_once:
            chosen.append(task)
            together[task.kind] += 1
    return chosen


def after_failure(task: Task, history: History, broke: Broke, now: float) -> tuple[History, Retrying | Failed]:
    """Try again or give up, when the attempt last placed has ended badly."""
    reached = (broke.progress.checkpoint_step if broke.progress else None) or 0
    got_further = reached > history.checkpoint_step
    failures = 0 if got_further else history.failures + (not broke.store_fault and not broke.node_fault)
    node_deaths = 0 if got_further else history.node_deaths + broke.node_fault
    outages = history.outages + 1 if broke.store_fault else 0
    history = replace(
        history,
        failures=failures,
        outages=outages,
        node_deaths=node_deaths,
        checkpoint_step=max(history.checkpoint_step, reached),
        avoid=(frozenset() if got_further else history.avoid)
        | ({broke.node.id} if broke.node and not broke.store_fault else frozenset()),
    )
    spent = failures >= task.max_attempts or outages >= MOST_OUTAGES or node_deaths >= MOST_NODE_DEATHS
    if broke.final or spent:
        tries = "" if broke.final else f" ({history.attempts} attempts)"
        return history, Failed(broke.error + tries, broke.node, broke.log, broke.progress)
    delay = 0.0 if broke.node_fault else min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** max(0, failures - 1, outages - 1))
    return history, Retrying(broke.error, now + delay, broke.progress)


def after_no_place(error: PlacementError, now: float) -> Retrying:
    """No living node can hold a task; those that could, when the run began, may come back."""
    return Retrying(str(error), now + PLACEMENT_DELAY)
