"""The consequences of a failure, as pure functions without a clock, a store or a launcher.

An error that would repeat itself (settings, data, weights that do not fit) fails the task at once. Every other error is
retried, at most `Task.max_attempts` times in a row without progress: an attempt that advances the last checkpoint
resets the count. An attempt whose node died, or that ended because the blob store was unavailable or denied a request,
does not count as a failure of the task. These two have limits of their own, so that a task on nodes that are often
taken away can still finish, and a task that kills its nodes ends.
"""

from dataclasses import replace

from bam_ray.control.observations import Crashed
from bam_ray.errors import (
    DataError,
    FamilyError,
    LossNotFinite,
    LossSpiked,
    PlacementError,
    SettingsError,
    UpcycleError,
)
from bam_ray.pipeline.states import Failed, History, Retrying, Running
from bam_ray.pipeline.tasks import Task

FINAL = (
    SettingsError,
    DataError,
    FamilyError,
    UpcycleError,
    PlacementError,
    LossNotFinite,
    LossSpiked,
)
FIRST_DELAY = 1.0  # seconds before the second attempt; each later delay doubles, up to `LONGEST_DELAY`
LONGEST_DELAY = 60.0
MOST_OUTAGES = 16  # consecutive attempts that an unavailable store may end: ten minutes, with their delays
MOST_NODE_DEATHS = 16  # attempts whose node may die before one advances the checkpoint
PIN_TIMEOUT = 120.0  # seconds for a node to start what was placed on it, before the task is placed again
PLACEMENT_DELAY = 15.0  # seconds between searches for a node, while none can hold a task
STOP_TIMEOUT = 120.0  # seconds for the last checkpoint of an attempt when the run is asked to stop
MOVE_TIMEOUT = 900.0  # the same when the task is to move: nobody waits for it, and killing it would lose work
FREE_KILLS = 3  # attempts that may be killed because they do not stop to move, before one counts as a failure
HANG_TIMEOUT = 900.0  # seconds without a sign of life after which a training attempt is reported; twice that, replaced
START_TIMEOUT = 3600.0  # the same before the first step and after the last, and for tasks that do not train
HANG_STEPS = 20  # a training attempt may also be silent for as long as this many steps take


def is_final(error: BaseException) -> bool:
    """Return True if another attempt would end in the same way."""
    return isinstance(error, FINAL)


def silence_limit(task: Task, state: Running, timeout: float) -> float:
    """Return the seconds without a sign of life after which an attempt is reported; twice that, it is replaced.

    Args:
        task: The task.
        state: The state of the attempt, which has measured its own steps.
        timeout: The shortest limit while the attempt trains, such as `HANG_TIMEOUT`.
    """
    trains = task.step_tokens > 0 and state.first_step > 0 and state.progress.step < task.total_steps
    if not trains:
        return timeout * START_TIMEOUT / HANG_TIMEOUT
    step_seconds = 1.0 / state.steps_per_second if state.steps_per_second else 0.0
    return max(timeout, HANG_STEPS * step_seconds, 3 * state.longest_silence)


def after_failure(task: Task, history: History, crashed: Crashed, now: float) -> tuple[History, Retrying | Failed]:
    """Decide whether to retry a task whose last attempt crashed; return its history and its next state."""
    reached = (crashed.progress.checkpoint_step if crashed.progress else None) or 0
    advanced = reached > history.checkpoint_step
    counts = not crashed.store_fault and not crashed.node_fault
    failures = 0 if advanced else history.failures + counts
    node_deaths = 0 if advanced else history.node_deaths + crashed.node_fault
    outages = history.outages + 1 if crashed.store_fault else 0
    failed_on = frozenset({crashed.node.id}) if crashed.node and not crashed.store_fault else frozenset()
    history = replace(
        history,
        failures=failures,
        outages=outages,
        node_deaths=node_deaths,
        kills=0 if advanced else history.kills,
        checkpoint_step=max(history.checkpoint_step, reached),
        avoid=(frozenset() if advanced else history.avoid) | failed_on,
    )
    exhausted = failures >= task.max_attempts or outages >= MOST_OUTAGES or node_deaths >= MOST_NODE_DEATHS
    if crashed.final or exhausted:
        attempts = "" if crashed.final else f" ({history.attempts} attempts)"
        return history, Failed(crashed.error + attempts, crashed.node, crashed.log, crashed.progress)
    delay = 0.0 if crashed.node_fault else min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** max(0, failures - 1, outages - 1))
    return history, Retrying(crashed.error, now + delay, crashed.progress)


def after_kill(history: History, checkpoint_step: int | None) -> tuple[History, bool]:
    """Return the history after an attempt that did not stop to move, and whether this counts as a failure.

    `checkpoint_step` is the step of the attempt's last checkpoint. A few such attempts are chance. A task that does not
    stop again and again would otherwise be moved without end.
    """
    reached = checkpoint_step or 0
    if reached > history.checkpoint_step:
        return replace(history, kills=1, failures=0, node_deaths=0, checkpoint_step=reached), False
    return replace(history, kills=history.kills + 1), history.kills >= FREE_KILLS


def after_no_capacity(error: PlacementError, now: float) -> Retrying:
    """Return the state of a task that no living node can hold; the nodes that could hold it may come back."""
    return Retrying(str(error), now + PLACEMENT_DELAY)
