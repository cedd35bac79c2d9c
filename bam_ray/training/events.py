"""The events of one attempt at a task that trains, and their log in the blob store.

<kind>/<id>/events/<attempt>.jsonl   one line per event: {"time": UTC, "event": name, ...the fields of the event}

Each event is a frozen dataclass. Its class attribute `name` and its fields are what the log stores.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import ClassVar

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.leases import AttemptNumber
from bam_ray.errors import StoreError
from bam_ray.pipeline.tasks import DamagedArtifact


@dataclass(frozen=True)
class Event:
    """The base of all events."""

    name: ClassVar[str]  # as the log stores it

    def note(self) -> str | None:
        """Return a sentence for the run's status table, or None if the event is not shown there."""
        return None


Emit = Callable[[Event], None]
"""Receives an event; returns at once."""


def ignore_event(event: Event) -> None:
    """Do nothing with an event."""


@dataclass(frozen=True)
class AttemptStarted(Event):
    """The attempt has the lease."""

    name = "started"
    attempt: str | None  # None on ranks above 0
    node: str
    host: str
    pid: int


@dataclass(frozen=True)
class Resumed(Event):
    """Training continues after `step`; 0: it starts from the beginning."""

    name = "resumed"
    step: int


@dataclass(frozen=True)
class SegmentStarted(Event):
    """From `step` on, the steps are computed on this device, in this precision, by this many processes."""

    name = "computing"
    step: int
    device: str
    precision: str
    micro_batch: int | None
    processes: int


@dataclass(frozen=True)
class MicroBatchHalved(Event):
    """Memory ran out, and the micro batch was halved, once or more often."""

    name = "micro_batch"
    step: int
    sequences: int | None
    before: int | None

    def note(self) -> str:
        """See `Event`."""
        return f"out of memory: micro batch {self.before} halved to {self.sequences}"


@dataclass(frozen=True)
class BlendUpdated(Event):
    """A dynamic blend has new weights, by domain."""

    name = "blend"
    step: int
    weights: Mapping[str, float]
    held_out: Mapping[str, float]  # NLL in nats per token
    reference: Mapping[str, float]

    def curves(self) -> dict[str, float]:
        """Return the weights and the held-out losses by the names of their curves."""
        named = (("blend", self.weights), ("held_out", self.held_out))
        return {f"{name}/{domain}": value for name, values in named for domain, value in values.items()}


@dataclass(frozen=True)
class BranchAbsorbed(Event):
    """A late branch is an expert from `step` on."""

    name = "absorbed"
    step: int
    branch: str

    def note(self) -> str:
        """See `Event`."""
        return f"absorbed late branch {self.branch} at step {self.step}"


@dataclass(frozen=True)
class BranchLeftOut(Event):
    """A late branch is damaged or does not fit, and does not become an expert."""

    name = "left_out"
    step: int
    branch: str
    error: str
    damaged: DamagedArtifact | None = None  # the branch, if its files differ from their digests

    def note(self) -> str:
        """See `Event`."""
        return f"left out late branch {self.branch}: {self.error}"


@dataclass(frozen=True)
class ExpertsShared(Event):
    """Fewer processes than requested share the experts, because a larger number would not divide them evenly."""

    name = "shared"
    experts: int
    processes: int
    wanted: int
    workers: int

    def note(self) -> str:
        """See `Event`."""
        return (
            f"{self.experts} experts on {self.workers} processes are shared by {self.processes} of them, "
            f"not by {self.wanted}"
        )


@dataclass(frozen=True)
class ExpertUseChanged(Event):
    """The experts of a mixture that get too few or too many tokens are not the same as before."""

    name = "experts"
    step: int
    dead: str
    overloaded: str

    @staticmethod
    def of(step: int, dead: Sequence[str], overloaded: Sequence[str]) -> "ExpertUseChanged":
        """Return the event for these experts; long lists are abbreviated."""
        return ExpertUseChanged(step, abbreviate(dead), abbreviate(overloaded))

    def note(self) -> str:
        """See `Event`."""
        return f"dead experts: {self.dead}; overloaded: {self.overloaded}"


@dataclass(frozen=True)
class CheckpointCommitted(Event):
    """The checkpoint of `step` is in the store."""

    name = "checkpoint"
    step: int


@dataclass(frozen=True)
class CheckpointRefused(Event):
    """A checkpoint is damaged and was skipped."""

    name = "refused"
    checkpoint: str  # <attempt>-<step>
    error: str

    def note(self) -> str:
        """See `Event`."""
        return f"skipped a damaged checkpoint: {self.error}"


@dataclass(frozen=True)
class RolledBack(Event):
    """The loss of `step` was not finite or spiked, and training continues after the checkpoint of step `to`."""

    name = "rolled_back"
    step: int
    to: int
    error: str

    def note(self) -> str:
        """See `Event`."""
        return f"rolled back from step {self.step} to {self.to}: {self.error}"


@dataclass(frozen=True)
class BatchSkipped(Event):
    """The loss of `step` spiked or was not finite, and its batch is not trained on."""

    name = "skipped"
    step: int
    error: str

    def note(self) -> str:
        """See `Event`."""
        return f"skipped a batch at step {self.step}: {self.error}"


@dataclass(frozen=True)
class AttemptStopped(Event):
    """The attempt was asked to stop and wrote a checkpoint."""

    name = "stopped"
    step: int


@dataclass(frozen=True)
class AttemptFinished(Event):
    """The artifact is committed."""

    name = "finished"
    step: int


@dataclass(frozen=True)
class AttemptFailed(Event):
    """The attempt ended with an error; `step` is 0 if it had not loaded a checkpoint yet."""

    name = "failed"
    step: int
    error: str


def abbreviate(names: Sequence[str], limit: int = 4) -> str:
    """Return the first `limit` names and the number of the others, or `none`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"


class EventLog:
    """The log of attempt `attempt` at the artifact under `prefix`; with None (ranks above 0) nothing is written.

    An attempt is the only writer of its log, so every put writes the whole log. The log never delays training and never
    fails it: lines that could not be written are written with the next event.
    """

    def __init__(self, store: BlobStore, prefix: str, attempt: AttemptNumber | None) -> None:
        self._store = store
        self._key = None if attempt is None else f"{prefix}/events/{attempt}.jsonl"
        self._lines: list[str] = []
        self._lines_put = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="events")

    def emit(self, event: Event) -> None:
        """Add an event; returns at once."""
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event.name, **asdict(event)}
        with self._lock:
            self._lines.append(json.dumps(line))
        if self._key is not None:
            self._pool.submit(self._put, self._key)

    def close(self) -> None:
        """Wait for the last put."""
        self._pool.shutdown(wait=True)

    def _put(self, key: str) -> None:
        with self._lock:
            lines = len(self._lines)
            data = "\n".join(self._lines) + "\n"
        if lines == self._lines_put:  # the store is slow: an earlier put has written this event already
            return
        with contextlib.suppress(StoreError):  # a log is not worth a run
            self._store.put(key, data.encode())
        self._lines_put = lines
