"""Training checkpoints in the blob store: uploaded in the background, the newest whole one found again.

<kind>/<id>/steps/<attempt>-<step>/   canonical state, trainer.json, manifest.json last
"""

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import Lease
from bam_ray.checkpoint.manifest import MANIFEST, Kind, Manifest
from bam_ray.errors import CheckpointError

TRAINER = "trainer.json"
KEEP = 2  # newest checkpoints kept: the last, and the one before should the last be damaged


@dataclass(frozen=True)
class Resumable:
    """A checkpoint found: its local folder, and what the loop had written into trainer.json."""

    folder: Path
    step: int
    trainer: dict[str, Any]
    refused: tuple[str, ...]  # newer ones that could not be used, and why


class Checkpoints:
    """The training checkpoints of one artifact. One upload at a time runs behind the training."""

    def __init__(self, store: BlobStore, kind: Kind, id: str, lease: Lease | None) -> None:
        self._store, self._kind, self._id = store, kind, id
        self._prefix = f"{kind}/{id}/steps/"
        self._lease = lease  # None: this process never writes (ranks above 0)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._pending: Future[None] | None = None
        self.committed_step: int | None = None

    def latest(self) -> Resumable | None:
        """The newest checkpoint that is whole; damaged ones are passed over, and named."""
        refused: list[str] = []
        for below in reversed(self._committed()):
            try:
                folder = Artifact(self._store, self._kind, self._id, "steps", below).fetch()
                trainer = json.loads((folder / TRAINER).read_text())
            except CheckpointError as error:
                refused.append(str(error))
                continue
            self.committed_step = trainer["step"]
            return Resumable(folder, trainer["step"], trainer, tuple(refused))
        return None

    def save(self, folder: Path, step: int, trainer: dict[str, Any]) -> None:
        """Upload `folder` (deleted afterwards) in the background, once the upload before is through.

        Raises what that upload raised, `StaleLease` where a newer attempt took over.
        """
        assert self._lease is not None
        self.wait()
        (folder / TRAINER).write_text(json.dumps(trainer))
        self._pending = self._pool.submit(self._upload, folder, step, self._lease)

    def wait(self) -> None:
        """Return when nothing is being uploaded; raises what the upload raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def clear(self) -> None:
        """Delete all of them: the artifact itself is committed."""
        for key in self._store.list(self._prefix):
            self._store.delete(key)

    def _upload(self, folder: Path, step: int, lease: Lease) -> None:
        below = f"{lease.number:04d}-{step:08d}"
        manifest = Manifest(id=self._id, kind=self._kind, name=below, step=step, attempt=lease.number)
        lease.check()
        Artifact(self._store, self._kind, self._id, "steps", below).publish(folder, manifest)
        self.committed_step = step
        shutil.rmtree(folder)
        for old in self._committed()[:-KEEP]:
            # The manifest goes first: what is half deleted is no checkpoint
            keys = sorted(self._store.list(f"{self._prefix}{old}/"), key=lambda key: not key.endswith(f"/{MANIFEST}"))
            for key in keys:
                self._store.delete(key)

    def _committed(self) -> list[str]:
        """`<attempt>-<step>` of every checkpoint that has a manifest, oldest first."""
        keys = self._store.list(self._prefix)
        return [key.split("/")[-2] for key in keys if key.endswith(f"/{MANIFEST}")]
