"""The value that every stage receives: one task of a run, on one rank.

    def make_corpus(run: TaskRun) -> Manifest: ...

    with run.attempt() as attempt:                  # stages that train: rank 0 takes the lease
        attempt.emit(Resumed(step=0))
        checkpoints = attempt.checkpoints(training)

The task is the one that the controller placed. Its resource request is the one that was chosen (a fallback, if no node
can satisfy the first choice), and its number of workers is the number that runs. The recipe has neither.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import AttemptNumber, Lease, take_epoch
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.errors import DigestMismatch, Interrupted
from bam_ray.pipeline.run import PipelineRun
from bam_ray.pipeline.tasks import StageContext, Task
from bam_ray.settings import MetricsSettings, Recipe, TrainingSettings
from bam_ray.training.curves import CurveWriter
from bam_ray.training.events import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    AttemptStopped,
    Emit,
    Event,
    EventLog,
    ignore_event,
)

if TYPE_CHECKING:
    from bam_ray.training.checkpoints import Checkpoints


@dataclass
class OpenAttempt:
    """The lease and the event log of an attempt in progress, and its number of finished steps."""

    lease: Lease | None  # None on ranks above 0
    log: EventLog
    steps_done: Callable[[], int] = lambda: 0  # 0 until training has found the checkpoint to resume from


@dataclass(frozen=True)
class TaskRun:
    """A task as it was placed, the run that it belongs to, and this rank's connection to the caller.

    Attributes:
        task: The task, with the resource request that was chosen.
        pipeline: The run.
        context: The connection to the caller.
        rank: The rank of this process in its process group.
        number: The number of the attempt; None if there is no controller.
        suspect: True if a reader found the committed files damaged, so that they must be checked.
        opened: The attempt in progress; None outside `attempt()`.
    """

    task: Task
    pipeline: PipelineRun
    context: StageContext
    rank: int = 0
    number: AttemptNumber | None = None
    suspect: bool = False
    opened: OpenAttempt | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.pipeline.recipe

    @property
    def store(self) -> BlobStore:
        """The blob store that holds all artifacts of the run."""
        return self.pipeline.store

    @property
    def artifact(self) -> Artifact:
        """The artifact that this task makes."""
        return Artifact(self.store, self.task.kind, self.task.id)

    def parent(self, kind: ArtifactKind, name: str) -> Artifact:
        """Return the artifact of another task of the same run; raises `KeyError` if there is no such task."""
        return self.pipeline.artifact(kind, name)

    @property
    def lease(self) -> Lease | None:
        """The lease of the open attempt; None on ranks above 0 and outside an attempt."""
        return self.opened.lease if self.opened else None

    def take_lease(self) -> Lease:
        """Take the lease of this attempt at the task's artifact.

        The controller has numbered the attempt. Without a controller, the attempt takes an epoch of its own.
        """
        number = self.number or AttemptNumber(take_epoch(self.store), 1)
        return Lease.take(self.store, self.artifact.prefix, number)

    def finished(self) -> Manifest | None:
        """Return the manifest of the task's artifact if it is committed and need not be made again.

        If a reader found its files damaged, they are read once more here, because the reader's node may be at fault.
        If they are damaged, the manifest is set aside.
        """
        manifest = self.artifact.manifest()
        if manifest is None or not self.suspect:
            return manifest
        try:
            self.artifact.check_files(manifest)
        except DigestMismatch as error:
            self.artifact.set_aside(manifest, str(error))
            return None
        return manifest

    @contextmanager
    def attempt(self) -> Iterator["TaskRun"]:
        """Open an attempt, and yield this run with the attempt's lease and event log.

        Rank 0 takes the lease. The log records how the attempt starts and how it ends.
        """
        lease = self.take_lease() if self.rank == 0 else None
        number = lease.number if lease else None
        log = EventLog(self.store, self.artifact.prefix, number)
        opened = OpenAttempt(lease, log)
        log.emit(AttemptStarted(str(number) if number else None, self.context.node, socket.gethostname(), os.getpid()))
        try:
            yield replace(self, opened=opened)
        except Interrupted:
            log.emit(AttemptStopped(opened.steps_done()))
            raise
        except Exception as error:
            log.emit(AttemptFailed(opened.steps_done(), f"{type(error).__name__}: {error}"))
            raise
        else:
            log.emit(AttemptFinished(opened.steps_done()))
        finally:
            log.close()

    def emit(self, event: Event) -> None:
        """Write an event to the log of the open attempt; returns at once."""
        assert self.opened is not None, "events belong to an attempt: call this inside `attempt()`"
        self.opened.log.emit(event)

    def track_steps(self, steps_done: Callable[[], int]) -> None:
        """Use `steps_done` for the step that the log records when the attempt ends."""
        assert self.opened is not None
        self.opened.steps_done = steps_done

    def curves(self, metrics: MetricsSettings) -> CurveWriter:
        """Return the writer of the curves of this task's artifact; it writes only in an attempt of rank 0."""
        return CurveWriter(metrics, self.artifact, self.task.name, self.lease.number if self.lease else None)

    def checkpoints(
        self, training: TrainingSettings, emit: Emit = ignore_event, extra_files: Sequence[Path] = ()
    ) -> "Checkpoints":
        """Return the training checkpoints of this task's artifact. They can be written only with a lease.

        Args:
            training: Settings that say how many checkpoints are kept.
            emit: Receives the events of the checkpoints.
            extra_files: Files that every new checkpoint gets a copy of.
        """
        from bam_ray.training.checkpoints import Checkpoints, Retention  # torch: only for stages that train

        retention = Retention(training.keep_last, training.keep_every)
        return Checkpoints(self.artifact, self.lease, retention, emit, extra_files=extra_files)
