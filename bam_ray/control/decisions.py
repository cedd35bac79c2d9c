"""The decisions of the controller: pure functions of tasks and states that return transitions.

`tracking` decides what follows from a launcher's reports, and `scheduling.placement` which tasks start and move.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from bam_ray.checkpoint.leases import AttemptNumber
from bam_ray.control import policies
from bam_ray.control.observations import AttemptStatus, Crashed, Queued
from bam_ray.control.store_watch import StoredTask
from bam_ray.control.tracking import after_end, end_attempt
from bam_ray.control.transitions import Drain, Free, Launch, PlacedTask, Transition
from bam_ray.pipeline import readiness
from bam_ray.pipeline.drain_policies import DrainPolicy
from bam_ray.pipeline.states import (
    Blocked,
    Committed,
    Draining,
    History,
    MadeElsewhere,
    Placing,
    Retrying,
    Running,
    State,
    Waiting,
)
from bam_ray.pipeline.tasks import Task
from bam_ray.scheduling.cluster_view import ClusterView
from bam_ray.scheduling.placement import (
    ActiveTask,
    Move,
    NoCapacity,
    PlacementDecision,
    Start,
    is_stranded,
)
from bam_ray.units import format_duration

Tasks = Mapping[str, Task]  # all by task id
States = Mapping[str, State]
Histories = Mapping[str, History]


def kill_unresponsive(tasks: Tasks, states: States, histories: Histories, now: float) -> Iterator[Transition]:
    """End the attempts that were asked to stop and have not stopped in time."""
    for task_id, state in states.items():
        if isinstance(state, Draining):
            timeout = policies.MOVE_TIMEOUT if state.moving else policies.STOP_TIMEOUT
            if now - state.since > timeout:
                yield _kill(tasks[task_id], state, histories[task_id], now)


def _kill(task: Task, state: Draining, history: History, now: float) -> Transition:
    cause = "killed: it did not stop in time"
    if state.moving:
        history, counts = policies.after_kill(history, state.progress.checkpoint_step if state.progress else None)
        if counts:
            return after_end(task, state, history, Crashed(cause, state.node, state.progress), None, now)
    return end_attempt(task.id, state, history, cause, now)


def replace_hung(
    tasks: Tasks, states: States, histories: Histories, timeout: float, now: float
) -> Iterator[Transition]:
    """End the attempts that have not shown a sign of life for too long; this counts as a failure."""
    for task_id, state in states.items():
        if isinstance(state, Running):
            silence = now - state.last_sign_at
            if silence > 2 * policies.silence_limit(tasks[task_id], state, timeout):
                error = f"no sign of progress for {format_duration(silence)}: the attempt was replaced"
                crashed = Crashed(error, state.node, state.progress)
                yield after_end(tasks[task_id], state, histories[task_id], crashed, None, now)


def make_again(reader: Task, status: AttemptStatus, states: States, histories: Histories) -> Iterator[Transition]:
    """Let committed tasks be made again, or at least checked, if `reader` found their files damaged."""
    for task_id in _found_damaged(status, states, histories):
        state = states.get(task_id)
        if isinstance(state, Committed):
            reason = f"{reader.full_name} found its files damaged; they are checked, and made again if they are"
            history = replace(histories[task_id], suspect=True, suspect_generation=state.generation, message=reason)
            yield Transition(task_id, state, Waiting(), reason, history=history)


def _found_damaged(status: AttemptStatus, states: States, histories: Histories) -> Iterator[str]:
    """Yield the ids of the artifacts that must be checked."""
    if isinstance(status, Crashed) and status.damaged is not None:
        yield status.damaged
    progress = None if isinstance(status, Queued) else status.progress
    for each in progress.damaged if progress is not None else ():
        state = states.get(each.id)
        is_current = isinstance(state, Committed) and state.generation == each.generation
        # An attempt that does without an artifact repeats its report, so each generation is checked once
        if is_current and histories[each.id].suspect_generation < each.generation:
            yield each.id


def leave_to_other(task_id: str, state: State, seen: StoredTask) -> Iterator[Transition]:
    """Follow what the store shows of a task of which no attempt runs here."""
    if seen.generation is not None:
        yield Transition(task_id, state, Committed(state.progress, seen.generation), "committed by another driver")
    elif seen.driver is not None:
        yield Transition(task_id, state, MadeElsewhere(seen.driver, state.progress), f"{seen.driver} makes it")
    elif isinstance(state, MadeElsewhere):
        yield Transition(task_id, state, Waiting(state.progress), "no other driver makes it any more")


def shut_down(states: States, now: float) -> Iterator[Transition]:
    """Drain the running tasks, and cancel those that no node runs yet."""
    for task_id, state in states.items():
        match state:
            case Placing():
                yield Transition(task_id, state, Waiting(state.progress), "the run is being stopped", Free())
            case Running():
                draining = Draining(state.node, state.progress, now, state.placed_at)
                yield Transition(task_id, state, draining, "the run is being stopped", Drain())


def leave_nodes(tasks: Tasks, states: States, leaving: set[str], now: float) -> Iterator[Transition]:
    """Move what trains on the nodes `leaving`, which will be taken away, while there is time for a checkpoint.

    A group moves if one of its nodes will be taken away. A task without checkpoints stays: it may still finish.
    """
    for task_id, state in states.items() if leaving else ():
        if isinstance(state, Running) and tasks[task_id].total_steps and leaving & {state.node.id, *state.nodes}:
            yield drain_to_move(task_id, state, "moved", now)


def drain_by_policy(drain_policy: DrainPolicy, tasks: Tasks, states: States, now: float) -> Iterator[Transition]:
    """Drain the running attempts that a policy selects."""
    for request in drain_policy(tasks, states):
        state = states[request.task_id]
        if isinstance(state, Running):
            yield drain_to_move(request.task_id, state, request.reason, now)


def withdraw_untaken(states: States, living: set[str], now: float) -> Iterator[Transition]:
    """Withdraw what was placed on a node that is not in `living`, or that has not started it in time."""
    for task_id, state in states.items():
        if isinstance(state, Placing) and state.node_id is not None:
            gone = state.node_id not in living
            if gone or now - state.since > policies.PIN_TIMEOUT:
                reason = "its node is gone" if gone else "its node did not start it in time"
                yield Transition(task_id, state, Waiting(state.progress), reason, Free())


def withdraw_stranded(
    active: Iterable[ActiveTask], histories: Histories, view: ClusterView, now: float
) -> Iterator[Transition]:
    """Withdraw the groups that wait for ranks on nodes that have died since they were placed."""
    for each in active:
        state = each.state
        if isinstance(state, Running) and not state.first_step and is_stranded(each.task, now - state.placed_at, view):
            cause = "nodes died before it started"
            yield end_attempt(each.task.id, state, histories[each.task.id], cause, now)


def block(tasks: Tasks, states: States) -> Iterator[Transition]:
    """Block the tasks that a failure cuts off.

    Parents come first in `tasks`: if each transition is applied before the next is taken, all descendants are blocked.
    """
    for task_id, state in states.items():
        if isinstance(state, Waiting | Retrying):
            blocker = readiness.blocking_task(tasks[task_id], tasks, states)
            if blocker:
                yield Transition(task_id, state, Blocked(blocker), f"{blocker} failed")


def after_placement(
    decision: PlacementDecision, states: States, histories: Histories, epoch: int, now: float
) -> Transition:
    """Return the transition for one decision of the placement; `epoch` is that of the driver."""
    match decision:
        case Start():
            return _launch(decision, states[decision.task.id], histories[decision.task.id], epoch, now)
        case Move(task_id, reason):
            state = states[task_id]
            assert isinstance(state, Running), state
            return drain_to_move(task_id, state, reason, now)
        case NoCapacity(task_id, error, since):
            history = replace(histories[task_id], no_capacity_since=since)
            retrying = policies.after_no_capacity(error, now)
            return Transition(task_id, states[task_id], retrying, retrying.error, history=history)


def drain_to_move(task_id: str, state: Running, cause: str, now: float) -> Transition:
    """Ask for a checkpoint, after which the task continues in another attempt."""
    draining = Draining(state.node, state.progress, now, state.placed_at, moving=True, cause=cause)
    return Transition(task_id, state, draining, cause, Drain())


def _launch(start: Start, state: State, history: History, epoch: int, now: float) -> Transition:
    """Start the next attempt at a task. This is where an attempt gets its number."""
    number = AttemptNumber(epoch, history.attempts + 1)
    placed = PlacedTask(start.task, number, start.group, history.suspect)
    following = replace(
        history,
        attempts=number.count,
        message=start.message or (history.message if history.suspect else ""),
        no_capacity_since=start.no_capacity_since,
    )
    placing = Placing(now, start.node_id, state.progress)
    action = Launch(placed, start.avoid, start.node_id)
    return Transition(start.task.id, state, placing, start.message or "the task is ready", action, following)
