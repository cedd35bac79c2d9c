"""Training checkpoints in the blob store: uploaded in the background, and read back from the newest intact one.

<kind>/<id>/steps/<attempt>-<step>/                          canonical state, trainer.json, manifest.json last
<kind>/<id>/steps/<attempt>-<step>/files/<attempt>-<save>/   the files of a process group

A checkpoint is a copy in memory, which is taken between two steps. One thread writes it to a local folder and uploads
it, and retries for a while if the store is down. Training waits only if two uploads are already pending. If the host
has no memory for a copy, the local folder is written at once.

In a process group every rank does this with its own part of the state. When its files are uploaded, a rank writes their
digests to `part-<rank>.json` in the same folder. Rank 0 waits for those of all ranks and commits the manifest with all
digests; the others wait for the manifest. No other checkpoint uses the folder, so the files of another one, or of an
earlier save of the same step, never count. Upload threads communicate only through the store. So ranks wait for uploads
there, and never in a collective, which has a time limit.
"""

import json
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from bam_ray.checkpoint.artifacts import FILES, Artifact, delete_keys
from bam_ray.checkpoint.leases import AttemptNumber, Lease
from bam_ray.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from bam_ray.checkpoint.scratch import new_scratch_folder, remove_scratch_folder
from bam_ray.errors import BlobNotFound, CheckpointError, StoreDenied, StoreError, StoreUnavailable, TrainingError
from bam_ray.training.events import CheckpointCommitted, CheckpointRefused, Emit, ignore_event
from bam_ray.training.state import SavableState
from bam_ray.units import MIB

TRAINER = "trainer.json"
MAX_PENDING = 2
STORE_TIMEOUT = 600.0  # seconds that a store may be down before the write of a file fails
SLOWEST_UPLOAD = 2 * MIB  # bytes per second of one rank, below which its part of a checkpoint is late
POLL_SECONDS = 1.0  # between two looks for what other ranks write to the store
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


@dataclass(frozen=True)
class CheckpointPart:
    """The part of a checkpoint that this rank writes.

    Attributes:
        step: The step of the checkpoint.
        number: The number of the part: the rank, or 0 for a whole checkpoint.
        count: The number of parts.
        artifact: The checkpoint.
        folder: The folder of the files, below the prefix of the checkpoint; empty for a whole checkpoint.
    """

    step: int
    number: int
    count: int
    artifact: Artifact
    folder: str

    def digests_key(self, number: int) -> str:
        """Return the key of the digests of part `number`."""
        return f"{self.artifact.prefix}/{self.folder}/part-{number:04d}.json"

    def digests(self, number: int) -> dict[str, FileEntry] | None:
        """Return the digests of the files of part `number`, or None if not all of them are uploaded."""
        try:
            found = json.loads(self.artifact.store.get(self.digests_key(number)))
        except BlobNotFound:
            return None
        return {name: FileEntry(**entry) for name, entry in found.items()}

    def is_committed(self) -> bool:
        """Return True if the checkpoint is committed, and not another one with the same step."""
        manifest = self.artifact.manifest()
        return manifest is not None and manifest.folder == self.folder

    def late_after(self, entries: Mapping[str, FileEntry]) -> float:
        """Return the time, on the monotonic clock, at which other ranks are late, when this rank's part is uploaded.

        The parts of all ranks have about the same size. Each rank may retry its files and then its digests for
        `STORE_TIMEOUT`, and reports an outage of the store itself. The other ranks wait longer than rank 0, which waits
        for the slowest of them.
        """
        limit = 2 * STORE_TIMEOUT + sum(entry.size for entry in entries.values()) / SLOWEST_UPLOAD
        return time.monotonic() + (2 * limit + STORE_TIMEOUT if self.number else limit)


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
            lease: The right to write; None: this process only reads, unless it gets the lease of rank 0
                (`share_lease`).
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
        self._saves = 0  # of all ranks
        self.in_parts = False  # True: the last state that was saved has parts of several ranks
        self.refused: list[CheckpointRefused] = []  # those that are newer than the one found

    def share_lease(self, gather: Gather) -> None:
        """Let all ranks write under the lease of rank 0. A collective."""
        number = gather(self._lease.number if self._lease else None)[0]
        if self._lease is None and number is not None:
            self._lease = Lease(self._store, self._artifact.prefix, number)

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

    def save(self, state: SavableState, trainer: dict[str, Any]) -> None:
        """Upload `state` and `trainer` (JSON and dataclasses, with the `step`) in the background.

        Waits while two uploads are pending. If the state has several parts, every rank calls this with its own, for
        the same steps in the same order.

        Raises:
            StaleLease: If an earlier upload found that a newer attempt took over.
            StoreError: If an earlier upload failed, for example because the store was down for too long.
        """
        assert self._lease is not None
        self._saves += 1
        self.in_parts = state.parts > 1
        part = self._part(state, trainer["step"], self._lease)
        self.settle(MAX_PENDING - 1)
        # The next step would change a live state, so it is written now
        folder = _write_locally(state, trainer, self._extra_files) if state.live else None
        # The upload takes the state out of the list, so that its memory is free as soon as it is in a local folder
        self._pending.append(self._pool.submit(self._upload, [state], folder, trainer, part, self._lease))

    def _part(self, state: SavableState, step: int, lease: Lease) -> CheckpointPart:
        name = f"{lease.number}-{step:08d}"
        folder = f"{FILES}/{lease.number}-{self._saves:06d}" if state.parts > 1 else ""
        return CheckpointPart(step, state.part, state.parts, self._checkpoint(name), folder)

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

    def _upload(
        self,
        states: list[SavableState],
        folder: Path | None,
        trainer: dict[str, Any],
        part: CheckpointPart,
        lease: Lease,
    ) -> None:
        folder = folder or _write_locally(states[0], trainer, self._extra_files)
        states.clear()
        try:
            if part.number:
                self._upload_part(folder, part, lease)
                return
            self._commit(folder, part, lease)
            self._emit(CheckpointCommitted(part.step))
            self._retrying(self._prune, part.step, lease)
        except StoreError as error:
            raise type(error)(
                f"the checkpoint of step {part.step} could not be written to {self._store.uri}: {error}; "
                "repair the store and run the same command to resume from the checkpoint before"
            ) from error
        finally:
            remove_scratch_folder(folder)

    def _upload_part(self, folder: Path, part: CheckpointPart, lease: Lease) -> None:
        """Upload the files of a rank above 0, then their digests, and wait for the commit."""
        entries = part.artifact.upload(folder, part.folder, lease, self._retrying)
        data = json.dumps({name: entry.model_dump() for name, entry in entries.items()}).encode()
        self._retrying(self._store.put, part.digests_key(part.number), data)
        self._wait_for(part.is_committed, "rank 0 did not commit", part.late_after(entries), lease)

    def _commit(self, folder: Path, part: CheckpointPart, lease: Lease) -> None:
        """Upload the files of rank 0, wait for those of the other ranks, and commit the checkpoint."""
        artifact = part.artifact
        self._retrying(lease.check)
        # After a rollback a damaged checkpoint of the same attempt can have this name: its manifest is not ours
        self._retrying(self._store.delete, f"{artifact.prefix}/{MANIFEST}")
        entries = artifact.upload(folder, part.folder, lease, self._retrying)
        limit = part.late_after(entries)
        for rank in range(1, part.count):
            find = partial(part.digests, rank)
            entries |= self._wait_for(find, f"rank {rank} did not upload its part of", limit, lease)
        manifest = Manifest(
            id=artifact.id,
            kind=artifact.kind,
            name=artifact.prefix.rpartition("/")[2],
            step=part.step,
            attempt=str(lease.number),
            folder=part.folder,
            files=entries,
        )
        self._retrying(artifact.commit, manifest, lease)

    def _wait_for(self, find: Callable[[], Any], failure: str, limit: float, lease: Lease) -> Any:
        """Call `find` until it returns something that is true, and return that.

        Raises:
            StaleLease: A newer attempt took over.
            TrainingError: Nothing was found when the clock reached `limit`.
        """
        while not (found := self._retrying(find)):
            self._retrying(lease.check)
            if time.monotonic() > limit:
                raise TrainingError(
                    f"{failure} a checkpoint in time: check the nodes of the group and their connections to "
                    f"{self._store.uri}"
                )
            time.sleep(POLL_SECONDS)
        return found

    def _prune(self, step: int, lease: Lease) -> None:
        """Delete the checkpoints that are not kept, and what is left of uploads that were not finished.

        Other ranks may already upload the checkpoint that follows `step`.
        """
        committed = self._committed()
        started = {key.removeprefix(self._prefix).partition("/")[0] for key in self._store.list(self._prefix)}
        unfinished = (name for name in started - set(committed) if _order(name) < (lease.number, step))
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
    return sorted(names, key=_order)


def _order(name: str) -> tuple[AttemptNumber, int]:
    """Return the attempt and the step of the checkpoint `<attempt>-<step>`."""
    return AttemptNumber.parse(name), int(name.rpartition("-")[2])


def _write_locally(state: SavableState, trainer: dict[str, Any], extra_files: Sequence[Path]) -> Path:
    """Write a part of a checkpoint to a local folder; raises `TrainingError` if that is not possible.

    The first part has the files that are not tensors.
    """
    folder = None
    try:
        folder = new_scratch_folder("step")
        state.write(folder)
        if state.part == 0:
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
