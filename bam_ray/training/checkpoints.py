"""Training checkpoints in the blob store: uploaded in the background, and read back from the newest intact one.

<kind>/<id>/steps/<attempt>-<step>/   canonical state, trainer.json, manifest.json last

A checkpoint is a copy in memory, which is taken between two steps. One thread writes it to a local folder and uploads
it, and retries for a while if the store is down. Training waits only if two uploads are already pending. If the host
has no memory for a copy, the local folder is written at once.
"""

import json
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from bam_ray.checkpoint.artifacts import Artifact, delete_keys
from bam_ray.checkpoint.leases import AttemptNumber, Lease
from bam_ray.checkpoint.manifest import MANIFEST, Manifest
from bam_ray.checkpoint.scratch import new_scratch_folder, remove_scratch_folder
from bam_ray.errors import BlobNotFound, CheckpointError, StoreDenied, StoreError, StoreUnavailable, TrainingError
from bam_ray.training.events import CheckpointCommitted, CheckpointRefused, Emit, ignore_event
from bam_ray.training.state import TrainingState

TRAINER = "trainer.json"
MAX_PENDING = 2
STORE_TIMEOUT = 600.0  # seconds that a store may be down before a write to it fails
DENIED_TIMEOUT = 180.0  # seconds that a store may deny all requests before a write to it fails
FIRST_DENIAL = "first_denial"

Gather = Callable[[Any], list[Any]]
"""Returns the values of all ranks in the order of ranks, on all ranks. A collective."""


def retry_while_unavailable() -> Retrying:
    """Return a retrying caller that calls a function again while the store is unavailable or denies the request.

    It gives up when the store was unavailable for `STORE_TIMEOUT`, or when it denied every request for
    `DENIED_TIMEOUT`. A denial is often temporary: a metadata server has no credentials for a moment, a session token is
    about to be renewed, or a gateway has just started.

    The intervals grow and are random, so that the branches do not all return to a store at the same time.
    """
    return Retrying(
        retry=retry_if_exception_type((StoreUnavailable, StoreDenied)),
        wait=wait_random_exponential(multiplier=0.5, max=30.0),
        stop=_is_exhausted,
        reraise=True,
    )


def _is_exhausted(state: RetryCallState) -> bool:
    """Return True if the store has failed for too long."""
    assert state.outcome is not None and state.outcome_timestamp is not None
    statistics = state.retry_object.statistics  # of this call
    if not isinstance(state.outcome.exception(), StoreDenied):
        statistics.pop(FIRST_DENIAL, None)
        return state.outcome_timestamp - state.start_time >= STORE_TIMEOUT
    first: float = statistics.setdefault(FIRST_DENIAL, state.outcome_timestamp)
    return state.outcome_timestamp - first >= DENIED_TIMEOUT


@dataclass(frozen=True)
class Retention:
    """The checkpoints that are kept: the newest `last`, and those whose step is a multiple of `every`."""

    last: int
    every: int | None

    def keeps_permanently(self, name: str) -> bool:
        """Return True if the checkpoint `<attempt>-<step>` is never pruned."""
        return self.every is not None and int(name.rpartition("-")[2]) % self.every == 0


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint that was read: its local folder, its URI, and the content of its trainer.json."""

    folder: Path
    uri: str
    step: int
    trainer: dict[str, Any]


class Checkpoints:
    """The training checkpoints of one artifact."""

    def __init__(
        self,
        artifact: Artifact,
        lease: Lease | None,
        retention: Retention,
        emit: Emit = ignore_event,
        retrying: Retrying | None = None,
        extra_files: Sequence[Path] = (),
    ) -> None:
        """Open the checkpoints of `artifact`.

        Args:
            artifact: The artifact that is trained.
            lease: The right to write; None: this process only reads (ranks above 0).
            retention: Which checkpoints are kept.
            emit: Receives the events of the checkpoints.
            retrying: Calls the store's operations; None: `retry_while_unavailable`.
            extra_files: Files that every new checkpoint gets a copy of.
        """
        self._artifact, self._store = artifact, artifact.store
        self._prefix = f"{artifact.prefix}/steps/"
        self._lease, self._retention, self._emit = lease, retention, emit
        self._extra_files = extra_files
        self._retrying = retrying or retry_while_unavailable()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._pending: deque[Future[None]] = deque()
        self.refused: list[CheckpointRefused] = []  # those that are newer than the one found

    def latest(self, gather: Gather = lambda mine: [mine]) -> FoundCheckpoint | None:
        """Return the newest intact checkpoint, or None; damaged ones are skipped, emitted, and added to `refused`.

        With the `gather` of many ranks, all ranks call this and get the newest checkpoint that all of them can read.
        Their `refused` are equal too.

        Raises:
            CheckpointError: On all ranks, if there is no such checkpoint but some ranks can read one. Then a node is at
                fault, and starting from the beginning would lose that checkpoint.
        """
        faulty_ranks: set[int] = set()
        for name in reversed(gather(self._committed())[0]):  # the list of rank 0, which writes the checkpoints
            found = self._read(name)
            errors = gather(found if isinstance(found, str) else None)
            failed = [rank for rank, error in enumerate(errors) if error]
            if not failed and isinstance(found, FoundCheckpoint):
                return found
            where = ""
            if len(failed) < len(errors):
                faulty_ranks.update(failed)
                where = f" (only on ranks {failed}: check their nodes)"
            for error in dict.fromkeys(errors[rank] for rank in failed):
                self.refused.append(CheckpointRefused(name, f"{error}{where}"))
                self._emit(self.refused[-1])
        if faulty_ranks:
            raise CheckpointError(
                f"no checkpoint under {self._store.uri}/{self._prefix} can be read on all {len(errors)} processes, "
                f"although some can be read on some: check the disks and the network of the nodes of ranks "
                f"{sorted(faulty_ranks)}, and run the same command to retry"
            )
        return None

    def _read(self, name: str) -> FoundCheckpoint | str:
        """Return the checkpoint `<attempt>-<step>`, or the error if it cannot be used."""
        artifact = self._checkpoint(name)
        try:
            folder = self._retrying(artifact.fetch)
            trainer = json.loads((folder / TRAINER).read_text())
        except (CheckpointError, BlobNotFound) as error:
            return str(error)
        return FoundCheckpoint(folder, artifact.uri, trainer["step"], trainer)

    def save(self, state: TrainingState, trainer: dict[str, Any]) -> None:
        """Upload `state` and `trainer` (JSON and dataclasses, with the `step`) in the background.

        Waits while two uploads are pending.

        Raises:
            StaleLease: If an earlier upload found that a newer attempt took over.
            StoreError: If an earlier upload failed, for example because the store was down for too long.
        """
        assert self._lease is not None
        self.settle(MAX_PENDING - 1)
        # The next step would change a live state, so it is written now
        folder = _write_locally(state, trainer, self._extra_files) if state.live else None
        # The upload takes the state out of the list, so that its memory is free as soon as it is in a local folder
        self._pending.append(self._pool.submit(self._upload, [state], folder, trainer, self._lease))

    def settle(self, pending: int = MAX_PENDING) -> None:
        """Wait until at most `pending` uploads are pending; raises the error of an upload that has failed."""
        while self._pending and (len(self._pending) > pending or self._pending[0].done()):
            self._pending.popleft().result()

    def wait(self) -> None:
        """Wait for all uploads; raises the error of an upload that has failed."""
        self.settle(0)

    def clear(self) -> None:
        """Delete all checkpoints that are not kept permanently, because the artifact itself is committed."""
        for name in {key.removeprefix(self._prefix).partition("/")[0] for key in self._store.list(self._prefix)}:
            if not self._retention.keeps_permanently(name):
                self._delete(name)

    def _checkpoint(self, name: str) -> Artifact:
        return Artifact(self._store, self._artifact.kind, self._artifact.id, "steps", name)

    def _upload(self, states: list[TrainingState], folder: Path | None, trainer: dict[str, Any], lease: Lease) -> None:
        step = trainer["step"]
        folder = folder or _write_locally(states[0], trainer, self._extra_files)
        states.clear()
        try:
            self._retrying(self._commit, folder, step, lease)
            self._emit(CheckpointCommitted(step))
            self._retrying(self._prune, lease)
        except StoreError as error:
            raise type(error)(
                f"the checkpoint of step {step} could not be written to {self._store.uri}: {error}; "
                "repair the store and run the same command to resume from the checkpoint before"
            ) from error
        finally:
            remove_scratch_folder(folder)

    def _commit(self, folder: Path, step: int, lease: Lease) -> None:
        name = f"{lease.number}-{step:08d}"
        lease.check()
        # After a rollback a damaged checkpoint of the same attempt can have this name: its manifest is not ours
        self._store.delete(f"{self._prefix}{name}/{MANIFEST}")
        artifact = self._checkpoint(name)
        manifest = Manifest(id=artifact.id, kind=artifact.kind, name=name, step=step, attempt=str(lease.number))
        artifact.publish(folder, manifest, lease)

    def _prune(self, lease: Lease) -> None:
        """Delete the checkpoints that are not kept, and what is left of uploads that were not finished."""
        committed = self._committed()
        started = {key.removeprefix(self._prefix).partition("/")[0] for key in self._store.list(self._prefix)}
        unfinished = (name for name in started - set(committed) if AttemptNumber.parse(name) <= lease.number)
        old = (name for name in committed[: -self._retention.last] if not self._retention.keeps_permanently(name))
        for name in (*unfinished, *old):
            self._delete(name)

    def _delete(self, name: str) -> None:
        delete_keys(self._store, self._store.list(f"{self._prefix}{name}/"))

    def _committed(self) -> list[str]:
        return committed_checkpoints(self._artifact)


def committed_checkpoints(artifact: Artifact) -> list[str]:
    """Return `<attempt>-<step>` of every checkpoint of `artifact` that has a manifest, by attempt, then by step."""
    keys = artifact.store.list(f"{artifact.prefix}/steps/")
    names = [key.split("/")[-2] for key in keys if key.endswith(f"/{MANIFEST}")]
    return sorted(names, key=lambda name: (AttemptNumber.parse(name), int(name.rpartition("-")[2])))


def _write_locally(state: TrainingState, trainer: dict[str, Any], extra_files: Sequence[Path]) -> Path:
    """Write a checkpoint to a local folder; raises `TrainingError` if that is not possible."""
    folder = None
    try:
        folder = new_scratch_folder("step")
        state.write(folder)
        (folder / TRAINER).write_text(json.dumps(trainer, default=asdict))
        for path in extra_files:
            shutil.copy(path, folder)
    except Exception as error:  # an error of the operating system, sometimes wrapped in a type of safetensors
        if folder is not None:
            remove_scratch_folder(folder)
        raise TrainingError(
            f"no checkpoint can be written to {tempfile.gettempdir()}: {error}; free space there or set TMPDIR"
        ) from error
    return folder
