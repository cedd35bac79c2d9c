"""Mix: train a mixture, its experts spread over a group of processes."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

import bam_ray.model  # noqa: F401 (registers the mixture with the Auto classes)
from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.control.tasks import StageContext
from bam_ray.settings import Losses, Recipe, TrainingSettings
from bam_ray.stages.lineage import Place
from bam_ray.stages.train import Job, train_to_artifact
from bam_ray.training.engine import Engine

EngineFactory = Callable[[PreTrainedModel, TrainingSettings, Losses, int], Engine]
"""(model, training settings, auxiliary losses, expert-parallel size) -> an engine over all ranks."""


def train_mixture(
    name: str, recipe: Recipe, store: BlobStore, context: StageContext, engine_factory: EngineFactory
) -> Manifest | None:
    """Train the mixture `name`; called on every rank of the group, returns the manifest on rank 0 alone."""
    place = Place(recipe, store, "mixtures", name)
    corpus_folder = place.other("corpora", "corpus").fetch()
    start = place.other("upcycled", name).fetch()
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    mix = recipe.mix
    # A group that lost nodes may have become too small for as many to share the experts
    sharing = math.gcd(mix.expert_parallel, dist.get_world_size() if dist.is_initialized() else 1)

    def make_engine(model: PreTrainedModel) -> Engine:
        return engine_factory(model, mix.training, mix.losses, sharing)

    blend = mix.blend or dict.fromkeys(recipe.data.domains, 1.0)
    job = Job(corpus_folder, blend, mix.training, recipe.metrics, carried=(start / "lineage.json",))
    return train_to_artifact(place, store, job, model, make_engine, context)
