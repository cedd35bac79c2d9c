"""A simulated run: the real controller and its policies over a simulated launcher and clock.

Nothing sleeps. Time jumps from event to event (a first step, the end of an attempt, a preemption, a replacement), and
the controller steps soon after each event.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bam_ray.blobs.memory import MemoryStore
from bam_ray.control.controller import Controller, RunOutcome
from bam_ray.control.transitions import changed_tasks
from bam_ray.pipeline.states import AttemptRecord, Committed, Failed, Retrying
from bam_ray.pipeline.tasks import Task
from bam_ray.planning.cluster_file import ClusterFile
from bam_ray.planning.simulated_launcher import SimulatedLauncher, SpeedOf

SETTLE_SECONDS = 1.0  # time until the controller steps again after a task has changed its state
YEAR = 365 * 86400.0  # longer than any run that ends


@dataclass(frozen=True)
class SimulationPace:
    """The resolution and the end of a simulation, in simulated seconds."""

    step_every: float = 60.0  # the controller steps at least this often while a task can still move
    retry_delay: float = SETTLE_SECONDS  # the next attempt at a task starts at most this late
    until: float = YEAR  # the simulation ends after this time even if the run has not ended


DEFAULT_PACE = SimulationPace()


@dataclass(frozen=True)
class SimulationResult:
    """The course of a simulated run. Times are in seconds from its start."""

    outcome: RunOutcome
    seconds: float
    attempts: Mapping[str, tuple[AttemptRecord, ...]]  # by task id
    preemptions: int
    errors: Mapping[str, str]  # errors of failed tasks, by task id

    @property
    def moves(self) -> int:
        """Number of times that a task moved to another node."""
        return sum(attempt.cause == "moved" for attempts in self.attempts.values() for attempt in attempts)

    def committed(self, task_id: str) -> bool:
        """Return True if the task was committed."""
        attempts = self.attempts[task_id]
        return bool(attempts) and attempts[-1].cause == "committed"

    def span(self, task_ids: Sequence[str]) -> tuple[float, float]:
        """Return the times at which the first of these tasks was placed and the last of them ended."""
        attempts = [attempt for task_id in task_ids for attempt in self.attempts[task_id]]
        return min(attempt.placed for attempt in attempts), max(attempt.ended for attempt in attempts)


def simulate(
    tasks: Sequence[Task],
    cluster: ClusterFile,
    speed_of: SpeedOf,
    checkpoint_every: Mapping[str, int],
    seed: int = 0,
    pace: SimulationPace = DEFAULT_PACE,
) -> SimulationResult:
    """Simulate a run of `tasks` on `cluster`.

    Args:
        tasks: The tasks of the run.
        cluster: The nodes, and the durations of starts, checkpoints and stages.
        speed_of: Returns the tokens per second of one worker.
        checkpoint_every: The steps between two checkpoints, by task id.
        seed: The seed of the preemption times.
        pace: How often the controller steps, and the time at which the simulation ends.

    Returns:
        The course of the run. Its outcome is "running" if the run had not ended at `pace.until`.
    """
    store = MemoryStore()
    launcher = SimulatedLauncher(cluster, store, speed_of, checkpoint_every, seed)
    controller = Controller(tasks, store, launcher, clock=lambda: launcher.now, wall=lambda: launcher.now)
    movable = [task.id for task in tasks if task.trains_alone]
    while True:
        transitions = controller.step()
        now = launcher.now
        if controller.outcome() != "running" or now >= pace.until:
            break
        retries = [state.not_before for state in controller.states.values() if isinstance(state, Retrying)]
        # A task whose retry is already due waits for capacity, which an event will free
        due = [max(now + pace.retry_delay, retry) for retry in retries if retry > now]
        times = [launcher.next_event(), pace.until, *due]
        if changed_tasks(transitions):
            times.append(now + SETTLE_SECONDS)
        if any(not isinstance(controller.states[task_id], Committed) for task_id in movable):
            times.append(now + pace.step_every)  # tasks also move between events
        launcher.advance(min(times))
    histories = {task_id: controller.history(task_id).past_attempts for task_id in controller.tasks}
    errors = {task_id: state.error for task_id, state in controller.states.items() if isinstance(state, Failed)}
    return SimulationResult(controller.outcome(), launcher.now, histories, launcher.preemptions, errors)
