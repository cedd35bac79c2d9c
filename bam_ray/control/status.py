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
from bam_ray.pipeline.states import Blocked, Failed, History, Retrying, Running, State, StateLabel
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.matching import bound

STATUS = "status.json"


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
    past: tuple[PastAttempt, ...] = ()  # under this coordinator and the earlier ones


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
    rows = tuple(_row(controller, task, now, earlier.get(task.id, ())) for task in controller.tasks.values())
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


def _row(controller: Controller, task: Task, now: datetime, earlier: tuple[PastAttempt, ...]) -> TaskRow:
    state = controller.states[task.id]
    history = controller.history(task.id)
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
        note=_note(state, progress, history.message) or describe_branches(task, controller.states),
        error=state.error if isinstance(state, Failed | Retrying) else None,
        log=state.log if isinstance(state, Failed) else (),
        past=(*earlier, *_past_attempts(history, now - timedelta(seconds=controller.now()))),
    )


def _task_eta(controller: Controller, task: Task, progress: Progress) -> float | None:
    """Return the seconds that a running task still takes: what its stage says, or what its speed and its steps say."""
    if progress.eta_seconds is not None:
        return progress.eta_seconds
    return controller.eta(task.id) if task.total_steps else None


def _past_attempts(history: History, clock_zero: datetime) -> list[PastAttempt]:
    """Return the finished attempts; `clock_zero` is the time of day at which the controller's clock showed 0."""
    return [
        PastAttempt(
            node=past.node.name if past.node else None,
            began=clock_zero + timedelta(seconds=past.placed),
            seconds=past.ended - past.placed,
            step=past.step,
            cause=past.cause,
        )
        for past in history.past_attempts
    ]


def _note(state: State, progress: Progress, message: str) -> str:
    if isinstance(state, Blocked):
        return f"{state.by} failed"
    return "" if state.label == "committed" else "; ".join(text for text in (message, progress.note) if text)
