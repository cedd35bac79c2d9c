"""Training checkpoints in the blob store: uploaded behind the training, the newest whole one found again.

<kind>/<id>/steps/<attempt>-<step>/   canonical state, trainer.json, manifest.json last

A checkpoint is a copy in memory, taken between two steps; one thread writes it to a local folder and uploads it, trying
again for a while where the store is down. Training waits only where two are on their way already. Where the host has no
memory for a copy, the local folder is written at once.
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

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import Lease
from bam_ray.checkpoint.manifest import MANIFEST, ArtifactKind, Manifest
from bam_ray.errors import BlobNotFound, CheckpointError, StoreUnavailable, TrainingError
from bam_ray.training.state import State

TRAINER = "trainer.json"
MOST_PENDING = 2
PATIENCE = 600.0  # seconds that a store may be down before a write to it is given up

Tell = Callable[..., None]
"""`tell(what, **facts)`: something happened that a person may want to read of (`training.events`)."""
Gather = Callable[[Any], list[Any]]
"""What all ranks give, in their order; the same on all, when all have given theirs."""


def patient() -> Retrying:
    """Calls a function again while it raises `StoreUnavailable`, at growing random intervals, for `PATIENCE` at most.

    Random, so that all branches do not come back to a store at once.
    """
    return Retrying(
        retry=retry_if_exception_type(StoreUnavailable),
        wait=wait_random_exponential(multiplier=0.5, max=30.0),
        stop=stop_after_delay(PATIENCE),
        reraise=True,
    )


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `last`, and those whose step is a multiple of `every`."""

    last: int
    every: int | None

    def for_good(self, below: str) -> bool:
        """Whether the checkpoint `<attempt>-<step>` is kept whatever follows."""
        return self.every is not None and int(below.rpartition("-")[2]) % self.every == 0


@dataclass(frozen=True)
class Resumable:
    """A checkpoint found: its local folder and where it lies, and what the loop had written into trainer.json."""

    folder: Path
    uri: str
    step: int
    trainer: dict[str, Any]


class Checkpoints:
    """The training checkpoints of one artifact."""

    def __init__(
        self,
        store: BlobStore,
        kind: ArtifactKind,
        id: str,
        lease: Lease | None,
        retention: Retention,
        tell: Tell = lambda what, **facts: None,
        retrying: Retrying | None = None,
        carried: Sequence[Path] = (),
    ) -> None:
        """`carried`: files that every checkpoint written from now on has a copy of."""
        self._store, self._kind, self._id = store, kind, id
        self._prefix = f"{kind}/{id}/steps/"
        self._lease = lease  # None: this process never writes (ranks above 0)
        self._retention = retention
        self._carried = carried
        self._tell = tell
        self._retrying = retrying or patient()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._pending: deque[Future[None]] = deque()
        self.committed_step: int | None = None
        self.refused: list[str] = []  # why newer checkpoints than the one found could not be used

    def latest(self, gather: Gather = lambda mine: [mine]) -> Resumable | None:
        """The newest checkpoint that is whole; damaged ones are passed over, told of, and added to `refused`.

        With the `gather` of many ranks, all of which call this, it is the newest that all can read: the same on all,
        and the notes too. Raises `CheckpointError` on all where there is none, but one that some can read: what is
        wrong is a node, and beginning anew would lose that one.
        """
        at_fault: set[int] = set()
        for below in reversed(gather(self._committed())[0]):  # as rank 0 sees it, which writes them
            found = self._read(below)
            errors = gather(found if isinstance(found, str) else None)
            failed = [rank for rank, error in enumerate(errors) if error]
            if not failed and isinstance(found, Resumable):
                self.committed_step = found.step
                return found
            where = ""
            if len(failed) < len(errors):
                at_fault.update(failed)
                where = f" (for ranks {failed} alone: look at their nodes)"
            for error in dict.fromkeys(errors[rank] for rank in failed):
                self.refused.append(f"{error}{where}")
                self._tell("refused", checkpoint=below, error=self.refused[-1])
        if at_fault:
            raise CheckpointError(
                f"no checkpoint under {self._store.uri}/{self._prefix} can be read on all {len(errors)} processes, "
                f"though some can on some: look at the nodes of ranks {sorted(at_fault)}, their disks and network; "
                "the same command tries again"
            )
        return None

    def _read(self, below: str) -> Resumable | str:
        """The checkpoint `<attempt>-<step>`, or why it cannot be used."""
        artifact = Artifact(self._store, self._kind, self._id, "steps", below)
        try:
            folder = self._retrying(artifact.fetch)
            trainer = json.loads((folder / TRAINER).read_text())
        except (CheckpointError, BlobNotFound) as error:
            return str(error)
        return Resumable(folder, artifact.uri, trainer["step"], trainer)

    def save(self, state: State, trainer: dict[str, Any]) -> None:
        """Upload `state` and `trainer` (JSON and dataclasses, with the `step`) in the background.

        Waits where two are on their way already.

        Raises what an upload before this one raised: `StaleLease` where a newer attempt took over, `StoreUnavailable`
        where the store was down for too long.
        """
        assert self._lease is not None
        self.settle(MOST_PENDING - 1)
        folder = _written(state, trainer, self._carried) if state.live else None  # the next step would change it
        self._pending.append(self._pool.submit(self._upload, state, folder, trainer, self._lease))

    def settle(self, pending: int = MOST_PENDING) -> None:
        """Return when no more than `pending` uploads are on their way; raises what one that has ended raised."""
        while self._pending and (len(self._pending) > pending or self._pending[0].done()):
            self._pending.popleft().result()

    def wait(self) -> None:
        """Return when nothing is being uploaded; raises what an upload raised."""
        self.settle(0)

    def clear(self) -> None:
        """Delete all but those that are kept for good: the artifact itself is committed."""
        for below in {key.removeprefix(self._prefix).partition("/")[0] for key in self._store.list(self._prefix)}:
            if not self._retention.for_good(below):
                self._delete(below)

    def _upload(self, state: State, folder: Path | None, trainer: dict[str, Any], lease: Lease) -> None:
        step = trainer["step"]
        folder = folder or _written(state, trainer, self._carried)
        try:
            self._retrying(self._commit, folder, step, lease)
            self.committed_step = step
            self._tell("checkpoint", step=step)
            self._retrying(self._prune)
        except StoreUnavailable as error:
            raise StoreUnavailable(
                f"the checkpoint of step {step} could not be written to {self._store.uri}: {error}; "
                "mend the store, the same command goes on from the checkpoint before"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _commit(self, folder: Path, step: int, lease: Lease) -> None:
        below = f"{lease.number:04d}-{step:08d}"
        lease.check()
        # After a rollback a damaged checkpoint of this very attempt may lie there: its manifest is not ours
        self._store.delete(f"{self._prefix}{below}/{MANIFEST}")
        manifest = Manifest(id=self._id, kind=self._kind, name=below, step=step, attempt=lease.number)
        Artifact(self._store, self._kind, self._id, "steps", below).publish(folder, manifest, lease.check)

    def _prune(self) -> None:
        for below in self._committed()[: -self._retention.last]:
            if not self._retention.for_good(below):
                self._delete(below)

    def _delete(self, below: str) -> None:
        # The manifest goes first: what is half deleted is no checkpoint
        keys = self._store.list(f"{self._prefix}{below}/")
        for key in sorted(keys, key=lambda key: not key.endswith(f"/{MANIFEST}")):
            self._store.delete(key)

    def _committed(self) -> list[str]:
        """`<attempt>-<step>` of every checkpoint that has a manifest, oldest first."""
        keys = self._store.list(self._prefix)
        return [key.split("/")[-2] for key in keys if key.endswith(f"/{MANIFEST}")]


def _written(state: State, trainer: dict[str, Any], carried: Sequence[Path]) -> Path:
    """A local folder with all of it; raises `TrainingError` where that cannot be."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="bam-step-"))
        state.write(folder)
        (folder / TRAINER).write_text(json.dumps(trainer, default=asdict))
        for path in carried:
            shutil.copy(path, folder)
    except Exception as error:  # the operating system's, at times wrapped in a type of safetensors' own
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise TrainingError(
            f"no checkpoint can be written to {tempfile.gettempdir()}: {error}; make room there or set TMPDIR"
        ) from error
    return folder
