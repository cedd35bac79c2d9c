"""Policies that end a running attempt early, so that the next attempt continues with more.

A drain policy is a pure function of the tasks and their states. It returns the running attempts that should write a
checkpoint and stop now. The controller drains them and starts the next attempts; it does not know the reasons.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bam_ray.pipeline.states import Committed, Running, State
from bam_ray.pipeline.tasks import Progress, Task


@dataclass(frozen=True)
class DrainRequest:
    """A running attempt that should write a checkpoint and stop."""

    task_id: str
    reason: str  # the cause in the record of the attempt


DrainPolicy = Callable[[Mapping[str, Task], Mapping[str, State]], Iterator[DrainRequest]]


def drain_for_late_branches(tasks: Mapping[str, Task], states: Mapping[str, State]) -> Iterator[DrainRequest]:
    """Drain the mixtures for which branches were committed after their attempt started.

    The next attempt absorbs these branches. A running attempt itself reports its experts and the branches that it could
    not use, once it trains; before that, it may still find the branch by itself. A branch that it found damaged is late
    again after it was made again.
    """
    for task in tasks.values():
        if task.quorum is None:
            continue
        state = states[task.id]
        if isinstance(state, Running) and state.first_step and state.progress.experts:
            late = [name for id, name in task.quorum.branches if _is_late(id, name, states[id], state.progress)]
            if late:
                yield DrainRequest(task.id, f"to absorb {', '.join(late)}")


def _is_late(id: str, name: str, branch: State, progress: Progress) -> bool:
    """Return True if a branch is committed, and the attempt that reports `progress` started without it."""
    if not isinstance(branch, Committed) or name in progress.experts:
        return False
    if name not in progress.left_out:
        return True
    return any(each.id == id and each.generation < branch.generation for each in progress.damaged)


DRAIN_POLICIES: tuple[DrainPolicy, ...] = (drain_for_late_branches,)
