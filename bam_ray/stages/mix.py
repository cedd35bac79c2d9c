"""Mix: train a mixture, with its experts spread over a process group."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.data import BlendedSampler, Corpus
from bam_ray.evaluation.perplexity import perplexity
from bam_ray.model.loading import load_folder
from bam_ray.pipeline.tasks import BranchQuorum
from bam_ray.settings import MixSettings
from bam_ray.stages.absorb import StartPoint, absorb_late_branches
from bam_ray.stages.publish import published_dtype
from bam_ray.stages.task_run import TaskRun
from bam_ray.stages.train import make_sampler, train_to_artifact
from bam_ray.stages.training_job import TrainingJob
from bam_ray.training.blending import DynamicBlendSampler, held_out_rows
from bam_ray.training.devices import requested_device
from bam_ray.training.document_mask import mask_documents
from bam_ray.training.engine import EngineFactory, EngineSpec
from bam_ray.training.events import ExpertsShared
from bam_ray.training.memory import limit_in_bytes
from bam_ray.training.meta_init import model_on_meta
from bam_ray.training.state import TensorFiles
from bam_ray.upcycling.write import LINEAGE

BATCH_SEQUENCES = 2  # beside a mixture in training


def train_mixture(run: TaskRun, engine_factory: EngineFactory) -> Manifest | None:
    """Train a mixture. Every rank of the process group calls this, and only rank 0 gets the manifest."""
    with run.attempt() as attempt:
        return _train(attempt, engine_factory)


def _train(run: TaskRun, engine_factory: EngineFactory) -> Manifest | None:
    mix = run.recipe.mix_of(run.task.name)
    corpus = Corpus(run.parent(ArtifactKind.CORPORA, "corpus").fetch())
    initial = run.parent(ArtifactKind.UPCYCLED, run.task.name)
    is_dense = run.recipe.upcycle.mixtures[run.task.name].is_dense  # a model soup
    blend = mix.blend or dict.fromkeys(run.recipe.data.names, 1.0)

    changes = gate_config(mix)
    initial_folder = initial.fetch()
    sampler = make_sampler(run, corpus, blend, mix.training)
    start = StartPoint(initial_folder)
    if run.task.quorum is not None:
        start = absorb_late_branches(run, changes, sampler.state_dict())
    model = model_on_meta(start.folder, **({} if is_dense else changes))
    experts: list[str] = [] if is_dense else model.config.expert_names
    # The experts must be shared equally. A process group that lost nodes may be too small for the setting, and so may
    # the number of experts while branches are missing.
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    sharing = 1 if is_dense else math.gcd(mix.expert_parallel, world_size, len(experts))
    training = mix.training.model_copy(update={"micro_batch_sequences": mix.micro_batch(world_size)})
    if not corpus.attend_across_documents:
        mask_documents(model, corpus.end_of_text_id)
    needs = run.task.needs
    spec = EngineSpec(
        model,
        training,
        mix,
        sharing,
        weights_folder=start.folder,
        memory_limit=limit_in_bytes(needs.memory_gib),
        device=requested_device(needs.gpus),
    )
    events = list(start.events)
    if experts and sharing < mix.expert_parallel:
        events.append(ExpertsShared(len(experts), sharing, mix.expert_parallel, world_size))
    lineage = start.folder / LINEAGE
    job = TrainingJob(
        corpus,
        _dynamic_sampler(sampler, run, corpus, experts, world_size) if mix.dynamic_blend else sampler,
        blend,
        mix.training,
        run.recipe.metrics,
        dtype=published_dtype(TensorReader(run.store, initial.prefix)),
        initial_weights=TensorFiles(sorted(initial_folder.glob("model*.safetensors"))),
        extra_files=(lineage,),
        events=events,
    )
    if run.task.quorum is not None:
        job = replace(job, **_quorum_record(run.task.quorum, initial, experts, lineage))
    return train_to_artifact(run, job, spec, engine_factory)


def _dynamic_sampler(
    sampler: BlendedSampler, run: TaskRun, corpus: Corpus, experts: Sequence[str], world_size: int
) -> DynamicBlendSampler:
    """Return a sampler whose blend depends on the losses on this rank's share of the held-out rows.

    A domain is compared with its own branch if the mixture has that as an expert, and with the seed otherwise.
    """
    settings = run.recipe.mix.dynamic_blend
    assert settings is not None
    has_branches = run.recipe.upcycle.mixtures[run.task.name].has_branches
    branched = set(run.recipe.branch.domains) & set(experts) if has_branches else set()

    def reference(domain: str, rows: np.ndarray) -> float:
        origin = (
            run.parent(ArtifactKind.BRANCHES, domain) if domain in branched else run.parent(ArtifactKind.SEEDS, "seed")
        )
        return dense_nll(origin, corpus, rows, requested_device(run.task.needs.gpus))

    rows = {
        domain: held_out_rows(corpus, domain, settings.sequences, run.rank, world_size) for domain in sampler.weights
    }
    return DynamicBlendSampler(sampler, settings, reference, rows)


def _quorum_record(quorum: BranchQuorum, initial: Artifact, experts: Sequence[str], lineage: Path) -> dict[str, Any]:
    """Return the fields of a `TrainingJob` that record branches which were committed late, or not in time."""
    first = initial.manifest()
    assert first is not None
    late = [(id, name) for id, name in quorum.branches if id not in first.parents]
    steps = [step["absorb"] for step in json.loads(lineage.read_text())["history"] if "absorb" in step]
    return {
        "extra_parents": tuple(id for id, name in late if name in experts),
        "extra_facts": {"left_out": [name for _, name in late if name not in experts]},
        "expert_history": [(step["step"], len(step["experts"]) - 1) for step in steps],
    }


def gate_config(mix: MixSettings) -> dict[str, Any]:
    """Return the changes that the settings make to the configuration of a mixture at step 0.

    Parameters that routers gain through them start at zero.
    """
    losses = mix.losses.at(1.0)
    return {
        "noisy_gate": mix.gate == "noisy",
        "selection_bias": mix.losses.bias_rate > 0,
        "capacity_factor": mix.capacity_factor,
        "router_aux_loss_coef": losses.load_balance,
        "router_z_loss_coef": losses.router_z,
    }


def dense_nll(origin: Artifact, corpus: Corpus, rows: np.ndarray, device: str) -> float:
    """Return the mean NLL in nats per token of a seed or branch on rows [S, L] of `corpus`, in fp32 on `device`."""
    model = load_folder(origin.fetch(), torch.float32)
    model.to(torch.device(device))
    if not corpus.attend_across_documents:
        mask_documents(model, corpus.end_of_text_id)
    return perplexity(model, rows, BATCH_SEQUENCES).nll
