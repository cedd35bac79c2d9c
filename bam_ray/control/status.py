"""`status.json` at the run root: the state of a run, for anyone who can read its blob store.

The coordinator writes it every few seconds, and `bam status` reads it from anywhere. It is for people only: nothing is
decided by it.
"""

from datetime import UTC, datetime, timedelta

from pydantic import AwareDatetime, BaseModel, ConfigDict, FiniteFloat, ValidationError

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.controller import Controller, RunOutcome
from bam_ray.errors import BlobNotFound, StoreError
from bam_ray.pipeline.readiness import describe_branches
from bam_ray.pipeline.states import (
    MOST_PAST_ATTEMPTS,
    Blocked,
    Committed,
    Failed,
    History,
    MadeElsewhere,
    Retrying,
    Running,
    StateLabel,
)
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.matching import bound
from bam_ray.units import format_duration

STATUS = "status.json"
MOST_PAST_IN_RUN = 20_000  # past attempts of all tasks together
TAKE_OVER_HINT = "if that driver is gone, submit with --take-over"


class PastAttempt(BaseModel):
    """One finished attempt."""

    model_config = ConfigDict(frozen=True)
    node: str | None
    began: AwareDatetime
    seconds: FiniteFloat
    step: int
    cause: str  # "committed", "moved", "stopped" or an error


class TaskRow(BaseModel):
    """One task."""

    model_config = ConfigDict(frozen=True)
    kind: ArtifactKind
    name: str
    id: str
    state: StateLabel
    node: str | None = None
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: FiniteFloat | None = None
    checkpoint_step: int | None = None
    attempt: int = 0
    note: str = ""
    error: str | None = None
    log: tuple[str, ...] = ()
    past: tuple[PastAttempt, ...] = ()  # the newest ones, under this coordinator and the earlier ones


class Status(BaseModel):
    """A whole run."""

    model_config = ConfigDict(frozen=True)
    updated: AwareDatetime
    run: str
    state: RunOutcome
    rows: tuple[TaskRow, ...]
    eta_kind: ArtifactKind | None = None  # the last stage whose end can be estimated
    eta_seconds: FiniteFloat | None = None


def build(run: str, controller: Controller, previous: Status | None = None) -> Status:
    """Return the status of `controller`'s tasks now.

    Args:
        run: The name of the run.
        controller: The controller of the run.
        previous: The last status that an earlier coordinator of the same run wrote; its attempts are kept.
    """
    now = datetime.now(UTC)
    earlier = {row.id: row.past for row in previous.rows} if previous else {}
    most_past = min(MOST_PAST_ATTEMPTS, max(1, MOST_PAST_IN_RUN // max(1, len(controller.tasks))))
    rows = tuple(_row(controller, task, now, earlier.get(task.id, ()), most_past) for task in controller.tasks.values())
    kind, seconds = _eta(controller)
    return Status(updated=now, run=run, state=controller.outcome(), rows=rows, eta_kind=kind, eta_seconds=seconds)


def write(store: BlobStore, status: Status) -> None:
    """Write a status to the run root."""
    store.put(STATUS, status.model_dump_json(indent=1).encode())


def read(store: BlobStore) -> Status | None:
    """Return the last status that was written; None if there is none.

    Raises:
        StoreError: The file is not a valid status.
    """
    try:
        return Status.model_validate_json(store.get(STATUS))
    except BlobNotFound:
        return None
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise StoreError(
            f"{store.uri}/{STATUS} is not a valid status ({message}): "
            "wait until its coordinator replaces it, or submit the run again"
        ) from None


def read_if_valid(store: BlobStore) -> Status | None:
    """Return the last status that was written; None if there is none or it is invalid.

    A new coordinator overwrites an invalid status.
    """
    try:
        return read(store)
    except StoreError:
        return None


def _eta(controller: Controller) -> tuple[ArtifactKind | None, float | None]:
    """Return the last stage that is being trained, and the seconds until its end on the nodes that train it now."""
    speeds: dict[ArtifactKind, list[float]] = {}
    for task_id, state in controller.states.items():
        if isinstance(state, Running) and state.steps_per_second:
            speeds.setdefault(controller.tasks[task_id].kind, []).append(state.steps_per_second)
    if not speeds:
        return None, None
    kind = list(speeds)[-1]
    stage = [task.id for task in controller.tasks.values() if task.kind == kind]
    steps = [controller.remaining_steps(id) for id in stage if not controller.states[id].is_final]
    return kind, bound(steps, speeds[kind])


def _row(
    controller: Controller, task: Task, now: datetime, earlier: tuple[PastAttempt, ...], most_past: int
) -> TaskRow:
    state = controller.states[task.id]
    history = controller.history(task.id)
    clock_zero = now - timedelta(seconds=controller.now())
    progress = state.progress or Progress(0, task.total_steps)
    committed = state.label == "committed"
    training = state.label in ("running", "draining")
    return TaskRow(
        kind=task.kind,
        name=task.name,
        id=task.id,
        state=state.label,
        node=state.node.name if state.node else None,
        step=progress.total_steps if committed else progress.step,
        total_steps=progress.total_steps,
        loss=progress.loss,
        tokens_per_second=progress.tokens_per_second if training else None,
        eta_seconds=_task_eta(controller, task, progress) if state.label == "running" else None,
        checkpoint_step=progress.checkpoint_step,
        attempt=controller.attempts(task.id),
        note=_note(controller, task.id, progress) or describe_branches(task, controller.states),
        error=state.error if isinstance(state, Failed | Retrying) else None,
        log=state.log if isinstance(state, Failed) else (),
        past=(*earlier, *_past_attempts(history, clock_zero, most_past))[-most_past:],
    )


def _task_eta(controller: Controller, task: Task, progress: Progress) -> float | None:
    """Return the seconds that a running task still takes: what its stage says, or what its speed and its steps say."""
    if progress.eta_seconds is not None:
        return progress.eta_seconds
    return controller.eta(task.id) if task.total_steps else None


def _past_attempts(history: History, clock_zero: datetime, most: int) -> list[PastAttempt]:
    """Return the newest `most` finished attempts.

    `clock_zero` is the time of day at which the clock of the controller showed 0.
    """
    return [
        PastAttempt(
            node=past.node.name if past.node else None,
            began=clock_zero + timedelta(seconds=past.placed),
            seconds=past.ended - past.placed,
            step=past.step,
            cause=past.cause,
        )
        for past in history.past_attempts[-most:]
    ]


def _note(controller: Controller, task_id: str, progress: Progress) -> str:
    state = controller.states[task_id]
    if isinstance(state, Blocked):
        return f"{state.by} failed"
    if isinstance(state, MadeElsewhere):
        return f"made by {state.driver}; {TAKE_OVER_HINT}"
    if isinstance(state, Committed):
        return ""
    silence = _silence(controller, task_id, state) if isinstance(state, Running) else ""
    return "; ".join(text for text in (controller.history(task_id).message, progress.note, silence) if text)


def _silence(controller: Controller, task_id: str, state: Running) -> str:
    """Say that an attempt may hang, if it has not shown a sign of life for too long."""
    silence, limit = controller.now() - state.last_sign_at, controller.silence_limit(task_id, state)
    if silence <= limit:
        return ""
    return f"no sign of progress for {format_duration(silence)}; it is replaced after {format_duration(2 * limit)}"
