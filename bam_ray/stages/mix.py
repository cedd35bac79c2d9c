"""Mix: train a mixture, its experts spread over a group of processes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

import bam_ray.model  # noqa: F401 (registers the mixture with the Auto classes)
from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.control.tasks import StageContext
from bam_ray.data import Corpus
from bam_ray.evaluation.perplexity import perplexity
from bam_ray.settings import Mixing, MixSettings, Recipe, TrainingSettings
from bam_ray.stages.lineage import Place
from bam_ray.stages.train import Following, Job, train_to_artifact
from bam_ray.training.documents import keep_apart
from bam_ray.training.engine import Engine

BATCH_SEQUENCES = 8
EngineFactory = Callable[[PreTrainedModel, TrainingSettings, Mixing, int], Engine]
"""(model, training settings, what the mixture learns by, expert-parallel size) -> an engine over all ranks."""


def train_mixture(
    name: str, recipe: Recipe, store: BlobStore, context: StageContext, engine_factory: EngineFactory
) -> Manifest | None:
    """Train the mixture `name`; called on every rank of the group, returns the manifest on rank 0 alone."""
    place = Place(recipe, store, "mixtures", name)
    corpus_folder = place.other("corpora", "corpus").fetch()
    start = place.other("upcycled", name).fetch()
    mix = recipe.mix
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, **gate_config(mix))
    # A group that lost nodes may have become too small for as many to share the experts
    sharing = math.gcd(mix.expert_parallel, dist.get_world_size() if dist.is_initialized() else 1)

    def make_engine(model: PreTrainedModel) -> Engine:
        return engine_factory(model, mix.training, mix, sharing)

    blend = mix.blend or dict.fromkeys(recipe.data.domains, 1.0)
    following = None
    if mix.dynamic_blend is not None:
        branched = recipe.branch.domains if recipe.upcycle.mixtures[name].has_branches else []

        def reference(domain: str, rows: np.ndarray) -> float:
            origin = place.other("branches", domain) if domain in branched else place.other("seeds", "seed")
            return dense_nll(origin, Corpus(corpus_folder), rows)

        following = Following(mix.dynamic_blend, reference)
    job = Job(corpus_folder, blend, mix.training, recipe.metrics, following, (start / "lineage.json",))
    return train_to_artifact(place, store, job, model, make_engine, context)


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
