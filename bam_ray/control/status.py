"""`status.json` at the run root: how a run stands, for anyone who can read its blob store.

The coordinator writes it every few seconds; `bam status` reads it from anywhere. It is for people alone: nothing is
decided by it.
"""

from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control import policies
from bam_ray.control.controller import Controller, Outcome
from bam_ray.errors import BlobNotFound, StoreError
from bam_ray.pipeline.states import Blocked, Committed, Draining, Failed, Placing, Retrying, Running, State, Waiting
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.matching import bound

STATUS = "status.json"

RowState = Literal["waiting", "blocked", "placing", "running", "draining", "retrying", "committed", "failed"]


class PastAttempt(BaseModel):
    """One attempt that is over."""

    model_config = ConfigDict(frozen=True)
    node: str | None
    began: datetime
    seconds: float
    step: int
    cause: str  # "committed", "moved", "stopped" or an error


class Row(BaseModel):
    """One task."""

    model_config = ConfigDict(frozen=True)
    kind: ArtifactKind
    name: str
    id: str
    state: RowState
    node: str | None = None
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    checkpoint_step: int | None = None
    attempt: int = 0
    note: str = ""
    error: str | None = None
    log: tuple[str, ...] = ()
    past: tuple[PastAttempt, ...] = ()  # of this coordinator and of those before it


class Status(BaseModel):
    """A whole run."""

    model_config = ConfigDict(frozen=True)
    updated: datetime
    run: str
    state: Outcome
    rows: tuple[Row, ...]
    eta_kind: ArtifactKind | None = None  # the furthest stage whose end can be told
    eta_seconds: float | None = None


def build(run: str, controller: Controller, before: Status | None = None) -> Status:
    """How `controller`'s tasks stand now; `before` is what an earlier coordinator of the same run last wrote."""
    now = datetime.now(UTC)
    earlier = {row.id: row.past for row in before.rows} if before else {}
    rows = tuple(_row(controller, task, now, earlier.get(task.id, ())) for task in controller.tasks.values())
    kind, seconds = _eta(controller)
    return Status(updated=now, run=run, state=controller.outcome(), rows=rows, eta_kind=kind, eta_seconds=seconds)


def write(store: BlobStore, status: Status) -> None:
    """Put it at the run root."""
    store.put(STATUS, status.model_dump_json(indent=1).encode())


def read(store: BlobStore) -> Status | None:
    """The last that was written, None where there is none; raises `StoreError` where it is unreadable."""
    try:
        return Status.model_validate_json(store.get(STATUS))
    except BlobNotFound:
        return None
    except ValidationError as error:
        raise StoreError(f"{store.uri}/{STATUS} is no status: {error.errors()[0]['msg']}") from None


def last(store: BlobStore) -> Status | None:
    """As `read`, but what is unreadable is nothing: a new coordinator writes over it."""
    try:
        return read(store)
    except StoreError:
        return None


def _eta(controller: Controller) -> tuple[ArtifactKind | None, float | None]:
    """Seconds until the furthest stage that is being trained is done, on the nodes that train it now."""
    speeds: dict[ArtifactKind, list[float]] = {}
    for task_id, state in controller.states.items():
        if isinstance(state, Running) and state.steps_per_second:
            speeds.setdefault(controller.tasks[task_id].kind, []).append(state.steps_per_second)
    if not speeds:
        return None, None
    kind = list(speeds)[-1]
    unfinished = [task.id for task in controller.tasks.values() if task.kind == kind]
    lost = (Committed, Failed, Blocked)
    steps = [controller.remaining_steps(id) for id in unfinished if not isinstance(controller.states[id], lost)]
    return kind, bound(steps, speeds[kind])


def _row(controller: Controller, task: Task, now: datetime, earlier: tuple[PastAttempt, ...]) -> Row:
    state = controller.states[task.id]
    history = controller.history(task.id)
    past = tuple(
        PastAttempt(
            node=ended.node.name if ended.node else None,
            began=now - timedelta(seconds=controller.now() - ended.placed),
            seconds=ended.ended - ended.placed,
            step=ended.step,
            cause=ended.cause,
        )
        for ended in history.ended
    )
    progress = _progress(state) or Progress(0, task.total_steps)
    committed = isinstance(state, Committed)
    node = state.node if isinstance(state, Running | Draining | Failed) else None
    return Row(
        kind=task.kind,
        name=task.name,
        id=task.id,
        state=_word(state),
        node=node.name if node else None,
        step=progress.total_steps if committed else progress.step,
        total_steps=progress.total_steps,
        loss=progress.loss,
        tokens_per_second=progress.tokens_per_second if isinstance(state, Running | Draining) else None,
        eta_seconds=controller.eta(task.id),
        checkpoint_step=progress.checkpoint_step,
        attempt=controller.attempts(task.id),
        note=_note(state, progress, history.said) or _arrivals(controller, task),
        error=state.error if isinstance(state, Failed | Retrying) else None,
        log=state.log if isinstance(state, Failed) else (),
        past=(*earlier, *past),
    )


def _note(state: State, progress: Progress, said: str) -> str:
    if isinstance(state, Blocked):
        return f"{state.by} failed"
    return "" if isinstance(state, Committed) else "; ".join(word for word in (said, progress.note) if word)


def _arrivals(controller: Controller, task: Task) -> str:
    """Which branches a task that can do without some waits for, or a mixture was made without."""
    state, quorum = controller.states[task.id], task.quorum
    if quorum is None:
        return ""
    arrived = policies.arrived(quorum, controller.states)
    if isinstance(state, Waiting) and quorum.at_least:
        return f"{len(arrived)} of {len(quorum.branches)} branches have arrived, {quorum.at_least} are enough"
    if isinstance(state, Committed) and state.progress and state.progress.experts:
        left_out = [name for _, name in quorum.branches if name not in state.progress.experts]
        return f"made without {', '.join(left_out)}: `bam absorb` adds what arrives now" if left_out else ""
    return ""


def _progress(state: State) -> Progress | None:
    return None if isinstance(state, Blocked) else state.progress


def _word(state: State) -> RowState:
    match state:
        case Blocked():
            return "blocked"
        case Placing():
            return "placing"
        case Running():
            return "running"
        case Draining():
            return "draining"
        case Retrying():
            return "retrying"
        case Committed():
            return "committed"
        case Failed():
            return "failed"
        case _:
            return "waiting"
