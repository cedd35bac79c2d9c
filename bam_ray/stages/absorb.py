"""Absorb: branches that arrived after their mixture had begun become experts of it, at its newest training checkpoint.

An attempt does it before it trains, on rank 0 and under its lease: what comes of it is a checkpoint of the same step,
committed like any other, from which all ranks go on. Experts that were there keep their weights and Adam's states; new
ones begin with the branch's weights, router rows drawn anew and states of zero. What all experts share has been trained
since the branch began, and stays as it is.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.leases import Lease
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import CheckpointError, FamilyError, UpcycleError, one_line
from bam_ray.settings import Recipe
from bam_ray.stages.lineage import Place
from bam_ray.stages.train import News
from bam_ray.training.checkpoints import Checkpoints, Gather, Retention
from bam_ray.training.state import State, grown, read_optimizer
from bam_ray.upcycling.dense import mixture_config_of
from bam_ray.upcycling.edit_experts import absorbed, change, names_of
from bam_ray.upcycling.write import CARRIED, LINEAGE

Load = Callable[[Path], PreTrainedModel]
"""A mixture's folder -> the model that is trained, whole."""

PATIENCE = timedelta(hours=12)  # for rank 0 to read branches and write a checkpoint; that it died is heard at once
UNFIT = (UpcycleError, FamilyError, CheckpointError)
"""What is a branch's fault: it does not fit, or is damaged."""


@dataclass(frozen=True)
class Begun:
    """What an attempt goes on from."""

    folder: Path  # the newest checkpoint, else the mixture at step 0
    news: Sequence[News]


def begin(
    place: Place, store: BlobStore, recipe: Recipe, lease: Lease | None, load: Load, cursor: dict[str, Any]
) -> Begun:
    """Bring a mixture that need not have all its branches up to date. Called on every rank, with rank 0's lease.

    `cursor` is where its data begins.
    """
    news: list[News] = []
    with others_wait() as gather:
        if lease is not None:
            news = absorb_late(place, store, recipe, lease, load, cursor)
        newest = _checkpoints(place, store, recipe).latest(gather)
    return Begun(newest.folder if newest else place.other(ArtifactKind.UPCYCLED, place.task.name).fetch(), news)


@contextmanager
def others_wait() -> Iterator[Gather]:
    """Until rank 0 is through this, no rank gets past it; with what gathers values of all ranks meanwhile."""
    if not dist.is_initialized():
        yield lambda mine: [mine]
        return
    # A group of its own: in the ranks' own, whose patience is for a step, an exchange that hangs is to be found soon
    waiting = dist.new_group(backend="gloo", timeout=PATIENCE)

    def gather(mine: Any) -> list[Any]:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine, group=waiting)
        return found

    yield gather
    dist.barrier(group=waiting)
    dist.destroy_process_group(waiting)


def absorb_late(
    place: Place, store: BlobStore, recipe: Recipe, lease: Lease, load: Load, cursor: dict[str, Any]
) -> list[News]:
    """Take in every branch of the task's quorum that is committed and no expert yet; returns what there is to tell.

    One that cannot be used is told of as `left_out`, and harms nothing.
    """
    task = place.task
    assert task.quorum is not None
    start = place.other(ArtifactKind.UPCYCLED, task.name)
    news: list[News] = []
    found = _checkpoints(place, store, recipe, tell=lambda what, **facts: news.append((what, facts)))
    newest = found.latest()
    folder, uri = (newest.folder, newest.uri) if newest else (start.fetch(), start.uri)
    first = TensorReader(store, start.prefix)
    mixture: TensorReader = _Named(folder, uri, first)
    there = names_of(mixture_config_of(mixture))
    step = newest.step if newest else 0
    late: list[str] = []
    left_out: list[News] = []
    with tempfile.TemporaryDirectory(prefix="bam-absorb-") as temporary:
        for name in (name for _, name in task.quorum.branches if name not in there):
            with_it = Path(temporary, name)
            try:
                if not _add(name, place, recipe, store, mixture, with_it, step):
                    continue
            except UNFIT as error:
                left_out.append(("left_out", {"step": step, "branch": name, "error": one_line(error)}))
                continue
            late.append(name)
            folder = with_it
            mixture = _Named(folder, uri, first)
        if not late:
            return left_out
        fresh = {"step": 0, "sampler": cursor, "curve": [], "legs": [], "refused": []}
        trainer: dict[str, Any] = newest.trainer if newest else fresh
        trainer["refused"] += found.refused
        if recipe.mix.dynamic_blend is not None:  # a new expert's domain is now measured against its branch
            trainer["sampler"]["reference"] = recipe.mix.dynamic_blend.reference
        trainer["changed"] = step
        # Whole, on rank 0 alone, as it is whenever rank 0 writes a checkpoint
        model = load(folder)
        states = grown(read_optimizer(newest.folder)[0], model) if newest else {}
        grew = _checkpoints(place, store, recipe, lease, carried=(folder / LINEAGE,))
        grew.save(State(model, model.state_dict(), states, step, live=True), trainer)
        grew.wait()
    return [*news, *(("absorbed", {"step": step, "branch": name}) for name in late), *left_out]


def _add(
    name: str, place: Place, recipe: Recipe, store: BlobStore, mixture: TensorReader, folder: Path, step: int
) -> bool:
    """Write `mixture` with the branch `name` to `folder`; False where that has not arrived. Raises `UNFIT`."""
    task, artifact = place.task, place.other(ArtifactKind.BRANCHES, name)
    if artifact.manifest() is None:
        return False
    branch = TensorReader(store, artifact.prefix)
    branch.check_digests()
    change(
        mixture,
        absorbed(mixture_config_of(mixture), name),
        branch,
        ModelWriter(open_store(str(folder))),
        Manifest(id=task.id, kind=task.kind, name=name, step=step),
        average_weight=0.0,
        seed=recipe.upcycle.mixtures[task.name].seed,
        step=step,
    )
    return True


def _checkpoints(
    place: Place, store: BlobStore, recipe: Recipe, lease: Lease | None = None, **named: Any
) -> Checkpoints:
    """The mixture's training checkpoints; without a `lease` they are only read."""
    retention = Retention(recipe.mix.training.keep_last, recipe.mix.training.keep_every)
    return Checkpoints(store, place.task.kind, place.task.id, lease, retention, **named)


class _Named(TensorReader):
    """A mixture in a local folder, by the name of what it was copied from. Checkpoints have no tokenizer: it is that of
    the mixture at step 0."""

    def __init__(self, folder: Path, uri: str, first: TensorReader) -> None:
        self._uri, self._first = uri, first
        super().__init__(open_store(str(folder)))

    @property
    def uri(self) -> str:
        return self._uri

    def read_file(self, name: str) -> bytes | None:
        return self._first.read_file(name) if name in CARRIED else super().read_file(name)
