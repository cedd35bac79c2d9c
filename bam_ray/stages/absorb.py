"""Absorb: branches that were committed after their mixture had started become experts of its newest checkpoint.

Rank 0 does this before an attempt trains, under the attempt's lease. It writes a checkpoint of the same step, which is
committed like any other, and all ranks resume from that. The experts that existed keep their weights and Adam states. A
new expert gets the branch's weights, newly drawn router rows, and Adam states of zero. With embedding experts, the
branch's embedding and head are among its weights. If the mixture has a router prior, the expert gets the counts of its
domain's text, and router rows of zero. The parameters that all experts share have been trained since the branch
started, and are not changed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import CheckpointError, FamilyError, UpcycleError, one_line
from bam_ray.model import BamConfig
from bam_ray.stages.task_run import TaskRun
from bam_ray.stages.token_counts import read_token_counts
from bam_ray.training.checkpoints import Gather
from bam_ray.training.events import BranchAbsorbed, BranchLeftOut, Event
from bam_ray.training.state import TrainingState, read_optimizer, resize_optimizer_state
from bam_ray.upcycling.dense import mixture_config_of
from bam_ray.upcycling.edit_experts import EditOptions, add_expert, names_of, write_edited_mixture
from bam_ray.upcycling.routers.counts import TokenCounts
from bam_ray.upcycling.tokenizers import is_carried
from bam_ray.upcycling.write import LINEAGE

LoadModel = Callable[[Path], PreTrainedModel]
"""Loads the whole model that is trained from a mixture's folder."""

ABSORB_TIMEOUT = timedelta(hours=12)
"""Time that rank 0 has to read branches and write a checkpoint. If rank 0 dies, the other ranks notice at once."""
UNUSABLE = (UpcycleError, FamilyError, CheckpointError)
"""Errors that are the branch's fault: it does not fit the mixture, or it is damaged."""


@dataclass(frozen=True)
class StartPoint:
    """The mixture that an attempt starts from, and what happened while it was prepared."""

    folder: Path  # the newest checkpoint, or the mixture at step 0
    events: Sequence[Event] = ()


def absorb_late_branches(run: TaskRun, load: LoadModel, sampler_state: dict[str, Any]) -> StartPoint:
    """Add the late branches on rank 0, and return what all ranks start from. Every rank calls this.

    Args:
        run: The open attempt at a mixture that need not wait for all its branches.
        load: Loads the model whose state is written to the new checkpoint.
        sampler_state: The sampler's state at step 0, for a mixture that has no checkpoint yet.
    """
    events: list[Event] = []
    with rank_zero_first() as gather:
        if run.lease is not None:
            events = _absorb(run, load, sampler_state)
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


def _absorb(run: TaskRun, load: LoadModel, sampler_state: dict[str, Any]) -> list[Event]:
    """Add every committed branch of the task's quorum that is no expert yet, and return the events of doing so.

    A branch that cannot be used is reported as `left_out`, and does not affect the mixture.
    """
    task, mix = run.task, run.recipe.mix
    assert task.quorum is not None
    refused: list[Event] = []
    checkpoints = run.checkpoints(mix.training, refused.append)
    newest = checkpoints.latest()
    step = newest.step if newest else 0
    start = run.parent(ArtifactKind.UPCYCLED, task.name)
    mixture = _MixtureFolder(
        newest.folder if newest else start.fetch(),
        newest.uri if newest else start.uri,
        TensorReader(run.store, start.prefix),
    )
    manifest = Manifest(id=task.id, kind=task.kind, name=task.name, step=step)
    config = mixture_config_of(mixture)
    present = names_of(config)
    late = [name for _, name in task.quorum.branches if name not in present]
    counts = _counts(run, config, late)
    seed = run.recipe.upcycle.mixtures[task.name].seed
    added: list[Event] = []
    left_out: list[Event] = []
    with scratch_folder("absorb") as temporary:
        for name in late:
            artifact = run.parent(ArtifactKind.BRANCHES, name)
            try:
                if not artifact.is_committed():
                    continue
                branch = TensorReader(run.store, artifact.prefix)
                options = EditOptions(average_weight=0.0, seed=seed, step=step, counts=counts.get(name))
                mixture = mixture.with_branch(name, branch, temporary / name, manifest, options)
            except UNUSABLE as error:
                left_out.append(BranchLeftOut(step, name, one_line(error)))
            else:
                added.append(BranchAbsorbed(step, name))
        if not added:
            return left_out
        trainer = newest.trainer if newest else _trainer_at_step_0(sampler_state)
        trainer["refused"] += checkpoints.refused
        trainer["changed"] = step
        if mix.dynamic_blend is not None:  # the domain of a new expert is compared with its branch from now on
            trainer["sampler"]["reference"] = mix.dynamic_blend.reference
        # The whole model on rank 0 alone, as always when rank 0 writes a checkpoint
        model = load(mixture.folder)
        optimizer = resize_optimizer_state(read_optimizer(newest.folder)[0], model) if newest else {}
        writing = run.checkpoints(mix.training, extra_files=(mixture.folder / LINEAGE,))
        writing.save(TrainingState(model, model.state_dict(), optimizer, step, live=True), trainer)
        writing.wait()
    return [*refused, *added, *left_out]


def _counts(run: TaskRun, config: BamConfig, branches: Sequence[str]) -> dict[str, TokenCounts]:
    """Return the counts of the text of each branch, if the mixture has a router prior."""
    if config.router_prior == "none" or not branches:
        return {}
    return read_token_counts(run.parent(ArtifactKind.CORPORA, "corpus").fetch(), branches)


def _trainer_at_step_0(sampler_state: dict[str, Any]) -> dict[str, Any]:
    """Return what the training loop would write to trainer.json before its first step."""
    return {"step": 0, "sampler": sampler_state, "curve": [], "legs": [], "refused": []}


class _MixtureFolder(TensorReader):
    """A mixture in a local folder, under the URI that it was copied from.

    Checkpoints have no tokenizer, so the tokenizer's files are read from `initial`, the mixture at step 0.
    """

    def __init__(self, folder: Path, uri: str, initial: TensorReader) -> None:
        self.folder, self._uri, self._initial = folder, uri, initial
        super().__init__(open_store(str(folder)))

    @property
    def uri(self) -> str:
        """The URI that the lineage records for this mixture."""
        return self._uri

    def read_file(self, name: str) -> bytes | None:
        """Return the content of a file, or None if there is no such file."""
        return self._initial.read_file(name) if is_carried(name) else super().read_file(name)

    def file_names(self, folder: str = "") -> list[str]:
        """Return the names of the files in a subfolder, which is one of the tokenizer's."""
        return self._initial.file_names(folder)

    def with_branch(
        self, name: str, branch: TensorReader, folder: Path, manifest: Manifest, options: EditOptions
    ) -> "_MixtureFolder":
        """Write this mixture with one more expert to `folder`, and return it; raises one of `UNUSABLE`."""
        branch.check_digests()
        write_edited_mixture(
            self,
            add_expert(mixture_config_of(self), name),
            branch,
            ModelWriter(open_store(str(folder))),
            manifest,
            options,
        )
        return _MixtureFolder(folder, self._uri, self._initial)
