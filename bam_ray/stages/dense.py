"""Seed, branches and controls: dense language models.

Each is trained by one process or one process group, without any others.
"""

from dataclasses import replace
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM, CohereConfig, PreTrainedConfig, PreTrainedModel

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.checkpoint.model_folder import is_part, refuse_outside_link
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.data import Corpus
from bam_ray.errors import CheckpointError, SettingsError
from bam_ray.families import check_weights, family_of
from bam_ray.model.loading import load_folder
from bam_ray.pipeline.tasks import Progress
from bam_ray.settings import DILOCO, Blend, PriorForm, Scratch, TrainingSettings
from bam_ray.stages.publish import published_dtype
from bam_ray.stages.task_run import TaskRun
from bam_ray.stages.token_counts import read_token_counts
from bam_ray.stages.train import make_sampler, train_to_artifact
from bam_ray.stages.training_job import TrainingJob
from bam_ray.training.devices import requested_device
from bam_ray.training.diloco import DiLoCoEngine
from bam_ray.training.document_mask import mask_documents
from bam_ray.training.engine import EngineFactory, EngineSpec
from bam_ray.training.memory import limit_in_bytes
from bam_ray.training.meta_init import model_on_meta
from bam_ray.training.torch_engine import TorchEngine
from bam_ray.upcycling.domain_priors import seed_with_tables, seed_with_vectors
from bam_ray.upcycling.tokenizers import is_carried


def train_seed(run: TaskRun, engine_factory: EngineFactory | None = None) -> Manifest | None:
    """Train the seed from scratch on its blend, or import it from a Hugging Face folder.

    With an `engine_factory`, every rank of a process group calls this, and only rank 0 gets the manifest.
    """
    corpus = Corpus(run.parent(ArtifactKind.CORPORA, "corpus").fetch())
    settings = run.recipe.seed
    if settings.folder is not None:
        return _import_seed(settings.folder, run, corpus)
    assert settings.scratch is not None and settings.training is not None
    torch.manual_seed(settings.training.seed)
    model = AutoModelForCausalLM.from_config(scratch_config(settings.scratch, corpus))
    blend = settings.blend or dict.fromkeys(run.recipe.data.names, 1.0)
    return _train_dense(run, corpus, blend, EngineSpec(model, settings.training), engine_factory)


def train_branch(run: TaskRun, engine_factory: EngineFactory | None = None) -> Manifest | None:
    """Train the seed on the branch's domain, mixed with a fraction of general text.

    With an `engine_factory`, every rank of a process group calls this, and only rank 0 gets the manifest.
    """
    settings, domain = run.recipe.branch, run.task.name
    blend = {run.recipe.data.general: settings.general_fraction}
    blend[domain] = blend.get(domain, 0.0) + 1.0 - settings.general_fraction
    return _train_seed_further(run, blend, settings.training, engine_factory)


def train_control(run: TaskRun, engine_factory: EngineFactory | None = None) -> Manifest | None:
    """Train the seed on the blend of the mixing phase, as one dense model. Some controls have a prior over domains.

    With an `engine_factory`, every rank of a process group calls this, and only rank 0 gets the manifest.
    """
    blend = run.recipe.mix.blend or dict.fromkeys(run.recipe.data.names, 1.0)
    assert run.recipe.compare is not None
    form = run.recipe.compare.prior_controls.get(run.task.name)
    model = None if form is None else _seed_with_prior(run, form)
    if run.task.name == DILOCO:
        assert run.recipe.compare.diloco is not None
        engine_factory = partial(DiLoCoEngine, settings=run.recipe.compare.diloco)
    return _train_seed_further(run, blend, run.recipe.controls[run.task.name], engine_factory, model)


def _seed_with_prior(run: TaskRun, form: PriorForm) -> PreTrainedModel:
    """Return the seed in fp32 with a prior over the domains of the corpus."""
    seed = run.parent(ArtifactKind.SEEDS, "seed")
    folder = run.parent(ArtifactKind.CORPORA, "corpus").fetch()
    counts = read_token_counts(folder, run.recipe.data.names)
    if form == "tables":
        return seed_with_tables(TensorReader(run.store, seed.prefix), counts)
    return seed_with_vectors(seed.fetch(), counts)


def scratch_config(scratch: Scratch, corpus: Corpus) -> PreTrainedConfig:
    """Return the configuration of a new seed that uses the corpus's tokenizer."""
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


def _train_seed_further(
    run: TaskRun,
    blend: Blend,
    training: TrainingSettings,
    engine_factory: EngineFactory | None,
    model: PreTrainedModel | None = None,
) -> Manifest | None:
    """Train a copy of the seed, or `model`, in fp32 and publish it in the dtype of the seed."""
    corpus = Corpus(run.parent(ArtifactKind.CORPORA, "corpus").fetch())
    seed = run.parent(ArtifactKind.SEEDS, "seed")
    weights_folder = None
    if model is None and engine_factory is not None and run.task.name != DILOCO:  # each rank reads its part
        weights_folder = seed.fetch()
        model = model_on_meta(weights_folder)
    elif model is None:
        model = load_folder(seed.fetch(), torch.float32)
    dtype = published_dtype(TensorReader(run.store, seed.prefix))
    spec = EngineSpec(model, training, weights_folder=weights_folder)
    return _train_dense(run, corpus, blend, spec, engine_factory, dtype)


def _train_dense(
    run: TaskRun,
    corpus: Corpus,
    blend: Blend,
    spec: EngineSpec,
    engine_factory: EngineFactory | None,
    dtype: torch.dtype = torch.float32,
) -> Manifest | None:
    """Train the model of `spec` in fp32 on the resources of the task, and publish it in `dtype`."""
    if not corpus.attend_across_documents:
        mask_documents(spec.model, corpus.end_of_text_id)
    needs = run.task.needs
    spec = replace(spec, memory_limit=limit_in_bytes(needs.memory_gib), device=requested_device(needs.gpus))
    sampler = make_sampler(run, corpus, blend, spec.training)
    job = TrainingJob(corpus, sampler, blend, spec.training, run.recipe.metrics, dtype)
    with run.attempt() as attempt:
        return train_to_artifact(attempt, job, spec, engine_factory or TorchEngine)


def _import_seed(uri: str, run: TaskRun, corpus: Corpus) -> Manifest:
    """Copy a Hugging Face folder into the store, after checking that it can be branched and upcycled."""
    lease = run.take_lease()
    source = open_store(uri, run.recipe.store.endpoint)
    reader = TensorReader(source)
    check_weights(reader, family_of(reader.config, uri))
    if any(is_part(shard) for shard in reader.shards):
        raise CheckpointError(
            f"{uri} is a training checkpoint that is divided into parts, which transformers cannot load: write a model "
            "folder with `bam export-step` and use that as seed.folder"
        )
    if corpus.vocab_size > reader.config["vocab_size"]:
        raise SettingsError(
            f"the corpus's tokenizer has {corpus.vocab_size} tokens but the seed {uri} only "
            f"{reader.config['vocab_size']}: set data.tokenizer.folder to the seed's folder, and if tokens were added "
            "to that tokenizer, remove them or grow the seed's embeddings (resize_token_embeddings)"
        )
    keys = [key for key in source.list() if _is_model_file(key, reader)]
    with scratch_folder("seed") as folder:
        for number, key in enumerate(keys):
            run.context.report(Progress(step=number, total_steps=len(keys), note=f"copying {key}"))
            if not key.endswith(".safetensors"):
                refuse_outside_link(source.uri, "", key)
            (folder / key).parent.mkdir(exist_ok=True)
            source.get_file(key, folder / key)
        # Branches write the configuration in the layout of the installed transformers. A seed in an older layout would
        # differ from them, so its configuration is rewritten.
        AutoConfig.from_pretrained(folder).save_pretrained(folder)
        task = run.task
        manifest = Manifest(
            id=task.id,
            kind=task.kind,
            name=task.name,
            parents=task.parents,
            settings=run.recipe.seed.model_dump(mode="json"),
            facts={"imported_from": uri, "architecture": reader.config["model_type"]},
            attempt=str(lease.number),
        )
        return run.artifact.publish(folder, manifest, lease)


def _is_model_file(key: str, reader: TensorReader) -> bool:
    """Return True if a file of a Hugging Face folder is needed.

    These are the shards of `reader`'s model, the configurations and the tokenizer's files. Folders often hold the
    weights in a second layout too, which is not copied.
    """
    if key.endswith(".safetensors"):
        return key in reader.shards
    if is_carried(key):
        return True
    return "/" not in key and key.endswith((".json", ".jinja", ".txt", ".model"))
