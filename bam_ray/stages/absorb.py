"""Absorb: branches that were committed after their mixture had started become experts of its newest checkpoint.

Rank 0 does this before an attempt trains, under the attempt's lease. It writes a checkpoint of the same step, which is
committed like any other, and all ranks resume from that. The experts that existed keep their weights and Adam states. A
new expert gets the branch's weights, newly drawn router rows, and Adam states of zero. With embedding experts, the
branch's embedding and head are among its weights. If the mixture has a router prior, the expert gets the counts of its
domain's text, and router rows of zero. The parameters that all experts share have been trained since the branch
started, and are not changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.folder_reader import FolderReader
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import CheckpointError, DigestMismatch, FamilyError, UpcycleError, one_line
from bam_ray.model import BamConfig
from bam_ray.pipeline.tasks import DamagedArtifact
from bam_ray.stages.task_run import TaskRun
from bam_ray.stages.token_counts import read_token_counts
from bam_ray.training.checkpoints import FoundCheckpoint, Gather
from bam_ray.training.events import BranchAbsorbed, BranchLeftOut, Event
from bam_ray.training.state import TrainingState, read_extended_optimizer
from bam_ray.upcycling.dense import mixture_config_of
from bam_ray.upcycling.edit_experts import EditOptions, add_expert, names_of, write_edited_mixture
from bam_ray.upcycling.routers.counts import TokenCounts
from bam_ray.upcycling.tokenizers import is_carried
from bam_ray.upcycling.write import LINEAGE

ABSORB_TIMEOUT = timedelta(hours=12)
"""Time that rank 0 has to read branches and write a checkpoint. If rank 0 dies, the other ranks notice at once."""
UNUSABLE = (UpcycleError, FamilyError, CheckpointError)
"""Errors that are the branch's fault: it does not fit the mixture, or it is damaged."""


@dataclass(frozen=True)
class StartPoint:
    """The mixture that an attempt starts from, and what happened while it was prepared."""

    folder: Path  # the newest checkpoint, or the mixture at step 0
    events: Sequence[Event] = ()


def absorb_late_branches(run: TaskRun, changes: Mapping[str, Any], sampler_state: dict[str, Any]) -> StartPoint:
    """Add the late branches on rank 0, and return what all ranks start from. Every rank calls this.

    Args:
        run: The open attempt at a mixture that need not wait for all its branches.
        changes: The changes that the settings make to the configuration of the mixture.
        sampler_state: The sampler's state at step 0, for a mixture that has no checkpoint yet.
    """
    events: list[Event] = []
    with rank_zero_first() as gather:
        if run.lease is not None:
            events = _absorb(run, changes, sampler_state)
        newest = run.checkpoints(run.recipe.mix.training).latest(gather)
    return StartPoint(newest.folder if newest else run.parent(ArtifactKind.UPCYCLED, run.task.name).fetch(), events)


@contextmanager
def rank_zero_first() -> Iterator[Gather]:
    """Hold the other ranks at the end of the block until rank 0 has finished it.

    Yields a function that gathers the values of all ranks inside the block.
    """
    if not dist.is_initialized():
        yield lambda mine: [mine]
        return
    # A separate process group, because the timeout of the default one is too short: it is that of a training step, so
    # that a collective that hangs is found soon.
    waiting = dist.new_group(backend="gloo", timeout=ABSORB_TIMEOUT)

    def gather(mine: Any) -> list[Any]:
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine, group=waiting)
        return gathered

    yield gather
    dist.barrier(group=waiting)
    dist.destroy_process_group(waiting)


def _absorb(run: TaskRun, changes: Mapping[str, Any], sampler_state: dict[str, Any]) -> list[Event]:
    """Write the newest checkpoint again with the late branches as experts, and return the events of doing so."""
    mix = run.recipe.mix
    checkpoints = run.checkpoints(mix.training)
    newest = checkpoints.latest()
    step = newest.step if newest else 0
    with scratch_folder("absorb") as temporary:
        folder, added, left_out = _add_experts(run, newest, temporary)
        if not added:
            return [*left_out]
        if newest:
            trainer = newest.trainer
        else:  # what the training loop would write to trainer.json before its first step
            trainer = {"step": 0, "sampler": sampler_state, "curve": [], "legs": [], "refused": []}
        trainer["refused"] += [refused.error for refused in checkpoints.refused]
        trainer["changed"] = step
        if mix.dynamic_blend is not None:  # the domain of a new expert is compared with its branch from now on
            trainer["sampler"]["reference"] = mix.dynamic_blend.reference
        # The whole model on rank 0 alone, as always when rank 0 writes a checkpoint
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes)
        optimizer = read_extended_optimizer(newest.folder, model) if newest else {}
        writing = run.checkpoints(mix.training, extra_files=(folder / LINEAGE,))
        writing.save(TrainingState(model, model.state_dict(), optimizer, step, live=True), trainer)
        writing.wait()
    return [*checkpoints.refused, *added, *left_out]


def _add_experts(
    run: TaskRun, newest: FoundCheckpoint | None, temporary: Path
) -> tuple[Path, list[BranchAbsorbed], list[BranchLeftOut]]:
    """Add every committed branch of the task's quorum that is no expert yet.

    A branch that cannot be used is left out, and does not affect the mixture. If it is damaged, the controller lets it
    be made again.

    Args:
        run: The open attempt.
        newest: The checkpoint to start from; None for the mixture at step 0.
        temporary: The folder in which a mixture is written for each branch that is added.

    Returns:
        The folder of the mixture with all new experts, and what happened to each branch.
    """
    task = run.task
    assert task.quorum is not None
    initial = run.parent(ArtifactKind.UPCYCLED, task.name)
    folder, uri, step = (newest.folder, newest.uri, newest.step) if newest else (initial.fetch(), initial.uri, 0)
    config = BamConfig.from_pretrained(folder)
    missing = [name for _, name in task.quorum.branches if name not in names_of(config)]
    artifacts = {name: run.parent(ArtifactKind.BRANCHES, name) for name in missing}
    generations = {name: artifact.generation() for name, artifact in artifacts.items()}
    late = [name for name, generation in generations.items() if generation.committed]
    counts: Mapping[str, TokenCounts] = {}
    if late and config.router_prior != "none":
        counts = read_token_counts(run.parent(ArtifactKind.CORPORA, "corpus").fetch(), late)
    mixture = _MixtureFolder(open_store(str(folder)), uri, initial)
    manifest = Manifest(id=task.id, kind=task.kind, name=task.name, step=step)
    seed = run.recipe.upcycle.mixtures[task.name].seed
    added, left_out = [], []
    for name in late:
        edit = add_expert(mixture_config_of(mixture), name)
        try:
            artifacts[name].check()  # before a damaged header could fail in another way
            branch = TensorReader(run.store, artifacts[name].prefix)
            writer = ModelWriter(open_store(str(temporary / name)))
            options = EditOptions(average_weight=0.0, seed=seed, step=step, counts=counts.get(name))
            write_edited_mixture(mixture, edit, branch, writer, manifest, options)
        except UNUSABLE as error:
            damaged = None
            if isinstance(error, DigestMismatch):
                damaged = DamagedArtifact(artifacts[name].id, generations[name].number)
            left_out.append(BranchLeftOut(step, name, one_line(error), damaged))
        else:
            folder, mixture = temporary / name, _MixtureFolder(writer.store, mixture.uri, initial)
            added.append(BranchAbsorbed(step, name))
    return folder, added, left_out


class _MixtureFolder(TensorReader):
    """A mixture in a local folder, under the URI that it was copied from.

    Checkpoints have no tokenizer, so the tokenizer's files are read from `initial`, the mixture at step 0.
    """

    def __init__(self, store: BlobStore, uri: str, initial: Artifact) -> None:
        self._uri, self._initial = uri, FolderReader(initial.store, initial.prefix)
        super().__init__(store)

    @property
    def uri(self) -> str:
        """The URI that the lineage records for this mixture."""
        return self._uri

    def read_file(self, name: str) -> bytes | None:
        """Return the content of a file, or None if there is no such file."""
        return self._initial.read_file(name) if is_carried(name) else super().read_file(name)

    def file_names(self, folder: str = "") -> list[str]:
        """Return the names of the files in the folder, or in a subfolder, which is one of the tokenizer's."""
        return self._initial.file_names(folder) if folder else super().file_names()
