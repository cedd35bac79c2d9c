"""The readiness of tasks: pure functions of the states of the tasks that they are made from.

A task starts when all of its parents are committed. A task with a `BranchQuorum` can start without some branches: as
soon as the required number is committed, or, with a deadline, when the deadline has passed or no other branch can come.
"""

from collections.abc import Mapping

from bam_ray.pipeline.states import Blocked, Committed, Failed, State, Waiting
from bam_ray.pipeline.tasks import BranchQuorum, Task

States = Mapping[str, State]  # of all tasks, by id


def committed_branches(quorum: BranchQuorum, states: States) -> list[str]:
    """Return the names of the quorum's branches that are committed."""
    return [name for id, name in quorum.branches if isinstance(states[id], Committed)]


def pending_branches(quorum: BranchQuorum, states: States) -> int:
    """Return the number of the quorum's branches that are neither committed nor failed."""
    return sum(not states[id].is_final for id, _ in quorum.branches)


def quorum_is_met(quorum: BranchQuorum, states: States, waited: float) -> bool:
    """Return True if a task should start with the committed branches, `waited` seconds after its deadline started."""
    if len(committed_branches(quorum, states)) < quorum.at_least:
        return False
    return waited >= quorum.deadline or not pending_branches(quorum, states)


def quorum_is_reachable(quorum: BranchQuorum, states: States) -> bool:
    """Return True if enough branches are committed or can still be."""
    return len(committed_branches(quorum, states)) + pending_branches(quorum, states) >= quorum.at_least


def required_parents_are_committed(task: Task, states: States) -> bool:
    """Return True if every parent that `task` cannot do without is committed."""
    optional = dict(task.quorum.branches) if task.quorum else {}
    return all(isinstance(states[parent], Committed) for parent in task.parents if parent not in optional)


def can_start(task: Task, states: States, waited: float) -> bool:
    """Return True if `task` has all that it is made from, `waited` seconds after its quorum's deadline started."""
    if not required_parents_are_committed(task, states):
        return False
    return task.quorum is None or quorum_is_met(task.quorum, states, waited)


def blocking_task(task: Task, tasks: Mapping[str, Task], states: States) -> str | None:
    """Return the failed task without which `task` can never start, such as `branches/law`; None if there is none."""
    optional = dict(task.quorum.branches) if task.quorum and quorum_is_reachable(task.quorum, states) else {}
    for parent in task.parents:
        if parent in optional:
            continue
        state = states[parent]
        if isinstance(state, Failed):
            return tasks[parent].full_name
        if isinstance(state, Blocked):
            return state.by
    return None


def is_optional_failure(task_id: str, tasks: Mapping[str, Task], states: States) -> bool:
    """Return True if a task failed, but every task that could be made without it is committed."""
    if not isinstance(states[task_id], Failed | Blocked):
        return False
    dependents = [task for task in tasks.values() if task.quorum and task_id in dict(task.quorum.branches)]
    return bool(dependents) and all(isinstance(states[task.id], Committed) for task in dependents)


def describe_branches(task: Task, states: States) -> str:
    """Return a note about the branches that `task` waits for or was made without; empty if there is nothing to say."""
    state, quorum = states[task.id], task.quorum
    if quorum is None:
        return ""
    if isinstance(state, Waiting) and quorum.at_least:
        count = len(committed_branches(quorum, states))
        return f"{count} of {len(quorum.branches)} branches are committed, {quorum.at_least} are required"
    if isinstance(state, Committed) and state.progress and state.progress.experts:
        missing = [name for _, name in quorum.branches if name not in state.progress.experts]
        return f"made without {', '.join(missing)}: add late branches with `bam absorb`" if missing else ""
    return ""
