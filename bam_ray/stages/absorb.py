"""Absorb: branches that arrived after their mixture had begun become experts of it, at its newest training checkpoint.

An attempt does it before it trains, on rank 0 and under its lease: what comes of it is a checkpoint of the same step,
committed like any other, from which all ranks go on. Experts that were there keep their weights and Adam's states; new
ones begin with the branch's weights, router rows drawn anew and states of zero. What all experts share has been trained
since the branch began, and stays as it is.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.leases import Lease
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.settings import Recipe, TrainingSettings
from bam_ray.stages.lineage import Place
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.state import State, grown, read_optimizer
from bam_ray.upcycling.dense import mixture_config_of
from bam_ray.upcycling.lifecycle import absorbed, change, names_of
from bam_ray.upcycling.write import CARRIED, LINEAGE

Load = Callable[[Path], PreTrainedModel]
"""A mixture's folder -> the model that is trained."""


def absorb_late(
    place: Place, store: BlobStore, recipe: Recipe, lease: Lease, load: Load, cursor: dict[str, Any]
) -> list[str]:
    """Take in every branch of the task's quorum that is committed and no expert yet; returns their names.

    `cursor` is where the data begins. Raises `UpcycleError` where a branch does not fit, `DigestMismatch` where one is
    damaged; the checkpoints are then as they were.
    """
    task, training = place.task, recipe.mix.training
    assert task.quorum is not None
    start = place.other("upcycled", task.name)
    found = checkpoints_of(place, store, training)
    newest = found.latest()
    folder, uri = (newest.folder, newest.uri) if newest else (start.fetch(), start.uri)
    first = TensorReader(store, start.prefix)
    mixture: TensorReader = _Named(folder, uri, first)
    there = names_of(mixture_config_of(mixture))
    arrived = {name: place.other("branches", name) for _, name in task.quorum.branches if name not in there}
    late = {name: artifact for name, artifact in arrived.items() if artifact.manifest() is not None}
    if not late:
        return []
    fresh = {"step": 0, "sampler": cursor, "curve": [], "legs": [], "refused": []}
    trainer: dict[str, Any] = newest.trainer if newest else fresh
    trainer["refused"] += found.refused
    if recipe.mix.dynamic_blend is not None:  # a new expert's domain is now measured against its branch
        trainer["sampler"]["reference"] = recipe.mix.dynamic_blend.reference
    step = trainer["changed"] = trainer["step"]
    with tempfile.TemporaryDirectory(prefix="bam-absorb-") as temporary:
        for name, artifact in late.items():
            branch = TensorReader(store, artifact.prefix)
            branch.check_digests()
            folder = Path(temporary, name)
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
            mixture = _Named(folder, uri, first)
        model = load(folder)
        states = grown(read_optimizer(newest.folder)[0], model) if newest else {}
        taken_in = checkpoints_of(place, store, training, lease, (folder / LINEAGE,))
        taken_in.save(State(model, model.state_dict(), states, step, live=True), trainer)
        taken_in.wait()
    return list(late)


def checkpoints_of(
    place: Place,
    store: BlobStore,
    training: TrainingSettings,
    lease: Lease | None = None,
    carried: tuple[Path, ...] = (),
) -> Checkpoints:
    """The training checkpoints of a task; without a `lease` they are only read."""
    retention = Retention(training.keep_last, training.keep_every)
    return Checkpoints(store, place.task.kind, place.task.id, lease, retention, carried=carried)


class _Named(TensorReader):
    """A mixture in a local folder, by the name of what it was copied from. Checkpoints have no tokenizer: it is that of
    the mixture at step 0."""

    def __init__(self, folder: Path, uri: str, first: TensorReader) -> None:
        self._uri, self._first = uri, first
        super().__init__(open_store(str(folder)))

    @property
    def uri(self) -> str:
        return self._uri

    def file(self, name: str) -> bytes | None:
        return self._first.file(name) if name in CARRIED else super().file(name)
