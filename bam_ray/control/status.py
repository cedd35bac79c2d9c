"""`status.json` at the run root: how a run stands, for anyone who can read its blob store.

The coordinator writes it every few seconds; `bam status` reads it from anywhere. It is for people alone: nothing is
decided by it.
"""

from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import Kind
from bam_ray.control.controller import Controller, Outcome
from bam_ray.control.states import Blocked, Committed, Draining, Failed, Placing, Retrying, Running, State
from bam_ray.control.tasks import Progress, Task
from bam_ray.errors import BlobNotFound, StoreError

STATUS = "status.json"

RowState = Literal["waiting", "blocked", "placing", "running", "draining", "retrying", "committed", "failed"]


class Row(BaseModel):
    """One task."""

    model_config = ConfigDict(frozen=True)
    kind: Kind
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


class Status(BaseModel):
    """A whole run."""

    model_config = ConfigDict(frozen=True)
    updated: datetime
    run: str
    state: Outcome
    rows: tuple[Row, ...]


def build(run: str, controller: Controller) -> Status:
    """How `controller`'s tasks stand now."""
    rows = tuple(_row(controller, task) for task in controller.tasks.values())
    return Status(updated=datetime.now(UTC), run=run, state=controller.outcome(), rows=rows)


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


def _row(controller: Controller, task: Task) -> Row:
    state = controller.states[task.id]
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
        note=f"{state.by} failed" if isinstance(state, Blocked) else ("" if committed else progress.note),
        error=state.error if isinstance(state, Failed | Retrying) else None,
        log=state.log if isinstance(state, Failed) else (),
    )


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
