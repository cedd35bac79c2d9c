"""Seed and branches: dense language models, each trained by one process or one group, which talks to no other."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, CohereConfig, PreTrainedConfig, PreTrainedModel

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.data import Corpus
from bam_ray.errors import SettingsError
from bam_ray.families import family_of
from bam_ray.pipeline.tasks import Progress, StageContext
from bam_ray.settings import Recipe, Scratch, TrainingSettings
from bam_ray.stages.lineage import Place
from bam_ray.stages.train import Job, train_to_artifact
from bam_ray.training.engine import Engine, TorchEngine

EngineFactory = Callable[[PreTrainedModel, TrainingSettings], Engine]
"""Makes an engine over all ranks of a group."""


def train_seed(
    name: str, recipe: Recipe, store: BlobStore, context: StageContext, engine_factory: EngineFactory | None = None
) -> Manifest | None:
    """The seed: trained from scratch on its blend, or a Hugging Face folder brought into the store.

    With `engine_factory` it is called on every rank of a group, and returns the manifest on rank 0 alone.
    """
    place = Place(recipe, store, ArtifactKind.SEEDS, name)
    corpus_folder = place.other(ArtifactKind.CORPORA, "corpus").fetch()
    settings = recipe.seed
    if settings.folder is not None:
        return _import_seed(settings.folder, place, Corpus(corpus_folder), recipe, context)
    assert settings.scratch is not None and settings.training is not None
    torch.manual_seed(settings.training.seed)
    model = AutoModelForCausalLM.from_config(scratch_config(settings.scratch, Corpus(corpus_folder)))
    blend = settings.blend or dict.fromkeys(recipe.data.domains, 1.0)
    job = Job(corpus_folder, blend, settings.training, recipe.metrics)
    return _train_dense(place, store, job, model, context, engine_factory)


def train_branch(
    name: str, recipe: Recipe, store: BlobStore, context: StageContext, engine_factory: EngineFactory | None = None
) -> Manifest | None:
    """The branch of domain `name`: the seed, trained on that domain with a part of general text.

    With `engine_factory` it is called on every rank of a group, and returns the manifest on rank 0 alone.
    """
    place = Place(recipe, store, ArtifactKind.BRANCHES, name)
    corpus_folder = place.other(ArtifactKind.CORPORA, "corpus").fetch()
    model = AutoModelForCausalLM.from_pretrained(place.other(ArtifactKind.SEEDS, "seed").fetch(), dtype=torch.float32)
    blend = {recipe.data.general: recipe.branch.general_fraction}
    blend[name] = blend.get(name, 0.0) + 1.0 - recipe.branch.general_fraction
    job = Job(corpus_folder, blend, recipe.branch.training, recipe.metrics)
    return _train_dense(place, store, job, model, context, engine_factory)


def scratch_config(scratch: Scratch, corpus: Corpus) -> PreTrainedConfig:
    """The configuration of a new seed over the corpus's tokenizer."""
    return CohereConfig(
        vocab_size=corpus.vocab_size,
        hidden_size=scratch.hidden_size,
        intermediate_size=scratch.intermediate_size,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.kv_heads,
        tie_word_embeddings=scratch.tie_embeddings,
        initializer_range=scratch.initializer_range,
        logit_scale=1.0,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=corpus.end_of_text_id,
        eos_token_id=corpus.end_of_text_id,
        pad_token_id=None,
    )


def _train_dense(
    place: Place,
    store: BlobStore,
    job: Job,
    model: PreTrainedModel,
    context: StageContext,
    engine_factory: EngineFactory | None,
) -> Manifest | None:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make_engine(model: PreTrainedModel) -> Engine:
        if engine_factory is not None:
            return engine_factory(model, job.training)
        return TorchEngine(model, job.training, device=device, memory_gib=place.task.needs.memory_gib)

    return train_to_artifact(place, store, job, model, make_engine, context)


def _import_seed(uri: str, place: Place, corpus: Corpus, recipe: Recipe, context: StageContext) -> Manifest:
    """Bring a Hugging Face folder into the store, having checked that it can be branched and upcycled."""
    source = open_store(uri, recipe.store.endpoint)
    reader = TensorReader(source)
    family_of(reader.config, uri)
    if corpus.vocab_size > reader.config["vocab_size"]:
        raise SettingsError(
            f"the corpus's tokenizer has {corpus.vocab_size} tokens but the seed {uri} only "
            f"{reader.config['vocab_size']}: set data.tokenizer.folder to the seed's folder"
        )
    keys = [key for key in source.list() if _is_of_a_model(key, reader)]
    with tempfile.TemporaryDirectory(prefix="bam-seed-") as folder:
        for number, key in enumerate(keys):
            context.report(Progress(step=number, total_steps=len(keys), note=f"copying {key}"))
            source.get_file(key, Path(folder) / key)
        # Branches write the configuration as transformers does today; in older layouts the seed's would differ from it
        AutoConfig.from_pretrained(folder).save_pretrained(folder)
        task = place.task
        manifest = Manifest(
            id=task.id,
            kind=task.kind,
            name=task.name,
            parents=task.parents,
            settings=recipe.seed.model_dump(mode="json"),
            facts={"imported_from": uri, "architecture": reader.config["model_type"]},
        )
        return place.artifact.publish(Path(folder), manifest)


def _is_of_a_model(key: str, reader: TensorReader) -> bool:
    """Whether a file of a Hugging Face folder is needed: shards of `reader`'s model (folders often hold the weights in
    a second layout too), configurations and what is the tokenizer's."""
    if key.endswith(".safetensors"):
        return key in reader.shards
    return "/" not in key and key.endswith((".json", ".jinja", ".txt", ".model"))
