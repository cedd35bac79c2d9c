"""Mix: train a mixture, its experts spread over a group of processes."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

import bam_ray.model  # noqa: F401 (registers the mixture with the Auto classes)
from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.data import Corpus
from bam_ray.evaluation.perplexity import perplexity
from bam_ray.pipeline.tasks import Quorum, StageContext
from bam_ray.settings import Mixing, MixSettings, Recipe, TrainingSettings
from bam_ray.stages.absorb import Begun, begin
from bam_ray.stages.attempt import Attempt, attempting
from bam_ray.stages.lineage import Place
from bam_ray.stages.train import Following, Job, sampler_of, train_to_artifact
from bam_ray.training.document_mask import keep_apart
from bam_ray.training.engine import Engine
from bam_ray.training.meta_init import outline
from bam_ray.upcycling.write import LINEAGE

BATCH_SEQUENCES = 8
EngineFactory = Callable[[PreTrainedModel, TrainingSettings, Mixing, int, Path], Engine]
"""(outline of the model, training settings, what it learns by, expert-parallel size, folder of its weights) -> an
engine over all ranks."""


def train_mixture(
    name: str, recipe: Recipe, store: BlobStore, context: StageContext, engine_factory: EngineFactory
) -> Manifest | None:
    """Train the mixture `name`; called on every rank of the group, returns the manifest on rank 0 alone."""
    place = Place(recipe, store, ArtifactKind.MIXTURES, name)
    rank = dist.get_rank() if dist.is_initialized() else 0
    with attempting(store, place.artifact.prefix, context, rank) as attempt:
        return _train(place, recipe, store, context, engine_factory, attempt)


def _train(
    place: Place,
    recipe: Recipe,
    store: BlobStore,
    context: StageContext,
    engine_factory: EngineFactory,
    attempt: Attempt,
) -> Manifest | None:
    name = place.task.name
    corpus_folder = place.other(ArtifactKind.CORPORA, "corpus").fetch()
    start = place.other(ArtifactKind.UPCYCLED, name)
    at_step_0 = start.fetch()
    mix = recipe.mix
    blend = mix.blend or dict.fromkeys(recipe.data.domains, 1.0)

    def whole(folder: Path) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gate_config(mix))
        return model

    if place.task.quorum is None:
        begun = Begun(at_step_0, [])
    else:
        cursor = sampler_of(place, Corpus(corpus_folder), blend, mix.training).state_dict()
        begun = begin(place, store, recipe, attempt.lease, whole, cursor)
    model = outline(begun.folder, **gate_config(mix))
    experts = model.config.num_experts
    # A group that lost nodes may be too small for as many to share the experts, and these too few while branches lack
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    sharing = math.gcd(mix.expert_parallel, world_size, experts)

    training = mix.training.model_copy(update={"micro_batch_sequences": mix.micro_batch(world_size)})

    def make_engine(model: PreTrainedModel) -> Engine:
        return engine_factory(model, training, mix, sharing, begun.folder)

    following = None
    if mix.dynamic_blend is not None:
        has_branches = recipe.upcycle.mixtures[name].has_branches
        branched = set(recipe.branch.domains) & set(model.config.expert_names) if has_branches else set()

        def reference(domain: str, rows: np.ndarray) -> float:
            origin = (
                place.other(ArtifactKind.BRANCHES, domain)
                if domain in branched
                else place.other(ArtifactKind.SEEDS, "seed")
            )
            return dense_nll(origin, Corpus(corpus_folder), rows)

        following = Following(mix.dynamic_blend, reference)
    news = list(begun.news)
    if sharing < mix.expert_parallel:
        facts = {"experts": experts, "processes": sharing, "wanted": mix.expert_parallel, "workers": world_size}
        news.append(("shared", facts))
    lineage = begun.folder / LINEAGE
    job = Job(corpus_folder, blend, mix.training, recipe.metrics, following, at_step_0, (lineage,), news=news)
    if place.task.quorum is not None:
        job = replace(job, **_arrivals(place.task.quorum, start, model.config.expert_names, lineage))
    return train_to_artifact(place, store, job, model, make_engine, context, attempt)


def _arrivals(quorum: Quorum, start: Artifact, experts: Sequence[str], lineage: Path) -> dict[str, Any]:
    """What a `Job` must know of branches that came after the mixture had begun, or did not."""
    first = start.manifest()
    assert first is not None
    late = [(id, name) for id, name in quorum.branches if id not in first.parents]
    absorbed = [step["absorb"] for step in json.loads(lineage.read_text())["history"] if "absorb" in step]
    return {
        "parents": tuple(id for id, name in late if name in experts),
        "facts": {"left_out": [name for _, name in late if name not in experts]},
        "grew": [(step["step"], len(step["experts"]) - 1) for step in absorbed],
    }


def gate_config(mix: MixSettings) -> dict[str, Any]:
    """What training makes of the configuration of a mixture at step 0; what its routers get anew begins at zero."""
    losses = mix.losses.at(1.0)
    return {
        "noisy_gate": mix.gate == "noisy",
        "selection_bias": mix.losses.bias_rate > 0,
        "capacity_factor": mix.capacity_factor,
        "router_aux_loss_coef": losses.load_balance,
        "router_z_loss_coef": losses.router_z,
    }


def dense_nll(origin: Artifact, corpus: Corpus, rows: np.ndarray) -> float:
    """The mean NLL of a seed or branch on rows [S, L] of `corpus`."""
    model = AutoModelForCausalLM.from_pretrained(origin.fetch(), dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if not corpus.attend_across_documents:
        keep_apart(model, corpus.end_of_text_id)
    return perplexity(model, rows, BATCH_SEQUENCES).nll
