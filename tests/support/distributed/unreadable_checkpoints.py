"""Two ranks that resume and roll back although some of them cannot read some checkpoints."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import CheckpointError, DigestMismatch, Interrupted, LossNotFinite
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.events import CheckpointCommitted, Event, RolledBack
from bam_ray.training.listener import TrainingListener
from bam_ray.training.loop import Training
from tests.support.distributed.cases import LENGTH, RESUMED, SHARE, ShareSampler
from tests.support.leases import next_lease

TOKENS = 8 * 2 * SHARE * LENGTH
SETTINGS = RESUMED.settings(SHARE).model_copy(
    update={"tokens": TOKENS, "batch_tokens": TOKENS // 8, "checkpoint_every": 2}
)


@contextmanager
def unreadable(*checkpoints: tuple[int, int]) -> Iterator[None]:
    """Make checkpoints, given as (rank, step), damaged for those ranks, as if their nodes were at fault."""
    fetch = Artifact.fetch
    mine = tuple(f"{step:08d}" for rank, step in checkpoints if rank == dist.get_rank())

    def fetch_or_fail(artifact: Artifact, cache: Path | None = None) -> Path:
        if artifact.prefix.endswith(mine):
            raise DigestMismatch(f"{artifact.prefix} does not match its manifest")
        return fetch(artifact, cache)

    with patch.object(Artifact, "fetch", fetch_or_fail):
        yield


class Attempt(TrainingListener):
    """One attempt at a mixture whose checkpoints are in `folder`, which is stopped at step `stop_at`."""

    def __init__(self, folder: Path, stop_at: int | None = None) -> None:
        rank = dist.get_rank()
        self.events: list[tuple[str, Any]] = []
        self.stop_at = stop_at
        store = FolderStore(folder)
        lease = next_lease(store, "mixtures/x") if rank == 0 else None
        self.training = Training(
            deepspeed_engine(replace(RESUMED.spec(), training=SETTINGS)),
            ShareSampler(),
            LENGTH,
            SETTINGS,
            Checkpoints(Artifact(store, ArtifactKind.MIXTURES, "x"), lease, Retention(9, None), self.emit),
            self,
        )
        self.training.resume()
        self.resumed_at = self.training.step

    def emit(self, event: Event) -> None:
        """Record a rollback with its step, or a refused checkpoint with its name."""
        if not isinstance(event, CheckpointCommitted):
            found = event.to if isinstance(event, RolledBack) else getattr(event, "checkpoint", None)
            self.events.append((event.name, found))

    def should_stop(self) -> bool:
        """Return True after step `stop_at`."""
        return self.training.step == self.stop_at

    def run(self) -> list[float]:
        """Train until the end or until step `stop_at`; return the NLL of every step since step 1."""
        try:
            curve = self.training.run().curve
        except Interrupted:
            curve = self.training.curve
        dist.barrier()  # wait until rank 0 has written its checkpoints
        return [point.nll for point in curve]


def resume_and_roll_back(folder: Path) -> dict[str, Any]:
    """Return what each rank did when the ranks could read different checkpoints."""
    os.environ["BAM_CACHE"] = str(folder / f"cache {os.environ['RANK']}")  # each rank has a cache, as on two nodes
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"unbroken": Attempt(folder / "unbroken").run()}
    Attempt(folder / "store", stop_at=6).run()

    with unreadable((0, 6), (1, 4)):
        attempt = Attempt(folder / "store", stop_at=3)
        found["resumed at"], found["refused"] = attempt.resumed_at, attempt.training.refused
        attempt.run()
    attempt = Attempt(folder / "store")
    found["resumed again at"] = attempt.resumed_at
    found["remembered"] = list(attempt.training.refused)
    attempt.training.train_step()
    attempt.training.save_checkpoint()
    with unreadable((1, 4)):
        attempt.training.handle_bad_loss(LossNotFinite("the loss (nan) is not finite"))
    found["events"] = list(attempt.events)
    found["curve"] = attempt.run()

    with unreadable(*((0, step) for step in range(0, 8, 2)), (1, 3)):
        try:
            Attempt(folder / "store")
        except CheckpointError as error:
            found["error"] = str(error)
    return found
