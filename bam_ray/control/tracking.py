"""The state changes that follow from the status of an attempt. All functions but `record_throughput` are pure."""

from collections.abc import Mapping
from dataclasses import replace

from bam_ray.control import policies
from bam_ray.control.observations import Alive, Crashed, Done, Queued, Stopped
from bam_ray.control.transitions import Free, PlacedTask, Transition
from bam_ray.pipeline.states import (
    AttemptRecord,
    Committed,
    Draining,
    History,
    MadeElsewhere,
    Node,
    Placing,
    Running,
    State,
    Waiting,
)
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.throughput import ThroughputTracker


def while_active(task: Task, state: State, status: Queued | Alive, now: float) -> Transition:
    """Update the state of a task whose attempt has not ended."""
    following = state
    if isinstance(status, Alive):
        following = _update(task, state, status, now)
    elif isinstance(state, Placing) and state.node_id is None:  # time in the launcher's queue is no time to start
        following = replace(state, since=now)
    return Transition(task.id, state, following, "a node runs the attempt")


def after_stop(task_id: str, state: Draining, history: History, status: Stopped, now: float) -> Transition:
    """Let a task wait for its next attempt after one that stopped as it was asked to."""
    progress = status.progress or state.progress
    history = _with_attempt(history, state, status.node, progress, state.cause, now)
    return Transition(task_id, state, Waiting(progress), state.cause, Free(), history)


def end_attempt(task_id: str, state: Running | Draining, history: History, cause: str, now: float) -> Transition:
    """End an attempt that has not failed; the task waits for its next attempt."""
    history = _with_attempt(history, state, state.node, state.progress, cause, now)
    return Transition(task_id, state, Waiting(state.progress), cause, Free(), history)


def after_end(
    task: Task, state: State, history: History, status: Done | Stopped | Crashed, generation: int | None, now: float
) -> Transition:
    """Decide whether a task is committed, retried or failed after an attempt that nobody asked to stop.

    If the artifact has a committed `generation`, the attempt succeeded, whatever the launcher reports: a node that was
    cut off may have committed before it died.
    """
    crashed = _as_crash(task, status)
    cause = crashed.error if generation is None else "committed"
    history = _with_attempt(history, state, crashed.node, crashed.progress, cause, now)
    if generation is not None:
        history = replace(history, suspect=False)
        return Transition(task.id, state, Committed(crashed.progress, generation), cause, Free(), history)
    if crashed.stale:
        elsewhere = MadeElsewhere("another attempt", crashed.progress)
        return Transition(task.id, state, elsewhere, cause, Free(), history)
    history, following = policies.after_failure(task, history, crashed, now)
    return Transition(task.id, state, following, cause, Free(), history)


def record_throughput(
    throughput: ThroughputTracker, placed: PlacedTask, transition: Transition, kinds: Mapping[str, str], now: float
) -> None:
    """Record what one report shows: the speed of an attempt, or the time of its start or of its last checkpoint.

    Args:
        throughput: Receives the measurement.
        placed: The attempt.
        transition: The change of its task's state that followed from the report.
        kinds: The kinds of all known nodes, by node id.
        now: The time on the controller's clock.
    """
    previous, state = transition.previous, transition.state
    if isinstance(previous, Draining) and previous.moving and isinstance(state, Waiting):
        throughput.record_checkpoint(placed.group, now - previous.since)
    if not isinstance(previous, Running) or not isinstance(state, Running):
        return
    if not previous.first_step and state.first_step:
        throughput.record_start(placed.group, now - previous.placed_at)
    elif state.last_step_at == now and state.steps_per_second and state.node.id in kinds:
        rate = state.steps_per_second * placed.task.step_tokens
        throughput.record_rate(placed.group, kinds[state.node.id], placed.task.id, rate)


def _update(task: Task, state: State, alive: Alive, now: float) -> Running | Draining:
    node, progress = alive.node, alive.progress
    match state:
        case Running(first_step=0) if progress and progress.step > 0:
            # Reading a checkpoint is no training: the speed is measured from the first step that is reported
            return Running(node, progress, now, progress.step, now, state.placed_at, alive.nodes, alive.signs, now)
        case Running():
            return _observed(state, alive, now)
        case Draining():
            return replace(state, node=node, progress=progress or state.progress)
        case _:
            assert isinstance(state, Placing), state
            # A resumed attempt reports its step only with its next step; until then show that of the last attempt
            known = progress or state.progress or Progress(0, task.total_steps)
            first_step = progress.step if progress else 0
            return Running(node, known, now, first_step, now, state.since, alive.nodes, alive.signs, now)


def _observed(state: Running, alive: Alive, now: float) -> Running:
    """Return the state of a task whose attempt trains. It is built at once, because every step does this for each."""
    progress = alive.progress or state.progress
    last_step_at, longest_silence, last_sign_at = state.last_step_at, state.longest_silence, state.last_sign_at
    if progress.step != state.progress.step:
        last_step_at = now
    if alive.signs != state.signs or progress != state.progress:
        longest_silence = max(longest_silence, now - last_sign_at if state.first_step else 0.0)
        last_sign_at = now
    return Running(
        node=alive.node,
        progress=progress,
        measured_from=state.measured_from,
        first_step=state.first_step,
        last_step_at=last_step_at,
        placed_at=state.placed_at,
        nodes=alive.nodes,
        signs=alive.signs,
        last_sign_at=last_sign_at,
        longest_silence=longest_silence,
    )


def _as_crash(task: Task, status: Done | Stopped | Crashed) -> Crashed:
    """Return what is wrong with an end if the task is not committed."""
    match status:
        case Done(node, progress):
            return Crashed(f"{task.full_name} ended without a manifest", node, progress)
        case Stopped(node, progress):
            return Crashed("the attempt stopped without being asked to", node, progress)
        case Crashed():
            return status


def _with_attempt(
    history: History, state: State, node: Node | None, progress: Progress | None, cause: str, now: float
) -> History:
    """Return `history` with the attempt that ends now; `state` is the state of its task until now."""
    placed_at = state.placed_at if isinstance(state, Placing | Running | Draining) else now
    return history.with_past_attempt(AttemptRecord(node, placed_at, now, progress.step if progress else 0, cause))
