"""Train a model and publish it: the part that seeds, branches and mixtures share."""

import time
import zlib

import numpy as np
import torch

from bam_ray.checkpoint.manifest import Manifest
from bam_ray.data import BlendedSampler, Corpus
from bam_ray.errors import SettingsError
from bam_ray.settings import Blend, TrainingSettings
from bam_ray.stages.publish import publish_model
from bam_ray.stages.task_run import TaskRun
from bam_ray.stages.training_job import DynamicBlendSpec, TrainingJob
from bam_ray.training.blending import DynamicBlendSampler
from bam_ray.training.curves import CurveWriter
from bam_ray.training.document_mask import mask_documents
from bam_ray.training.engine import Engine, EngineFactory, EngineSpec
from bam_ray.training.events import BranchLeftOut, Emit, Resumed
from bam_ray.training.loop import Training
from bam_ray.training.objective import as_mixture
from bam_ray.training.reporting import RunReporter, TrainingCurves
from bam_ray.training.router_metrics import RouterMetrics
from bam_ray.training.state import TensorFiles


def train_to_artifact(
    run: TaskRun, job: TrainingJob, spec: EngineSpec, engine_factory: EngineFactory
) -> Manifest | None:
    """Train the model of `spec` in the open attempt of `run`, and publish it as a Hugging Face folder.

    Every rank calls this. It returns the manifest on rank 0 and None on the others. It raises `Interrupted` after it
    has written a checkpoint, if the context asks it to stop.
    """
    corpus = Corpus(job.corpus_folder)
    if not corpus.attend_across_documents:
        mask_documents(spec.model, corpus.end_of_text_id)
    engine = engine_factory(spec)
    started = time.monotonic()

    blended = make_sampler(run, corpus, job.blend, job.training)
    reporter = _reporter(run, job, corpus, engine, blended)
    dynamic = job.dynamic_blend
    sampler = blended if dynamic is None else _dynamic_sampler(dynamic, corpus, blended, engine, reporter.emit)
    checkpoints = run.checkpoints(job.training, reporter.emit, job.extra_files)
    training = Training(engine, sampler, corpus.sequence_length, job.training, checkpoints, reporter)
    run.track_steps(lambda: training.step)

    training.resume()
    for event in (Resumed(training.step), *job.events):
        reporter.emit(event)
    training.run()
    manifest = publish_model(run, job, corpus, engine, training, blended, time.monotonic() - started)
    if manifest is not None:
        checkpoints.clear()
    return manifest


def make_sampler(run: TaskRun, corpus: Corpus, blend: Blend, training: TrainingSettings) -> BlendedSampler:
    """Return the sampler of a task's batches, at its first step."""
    # Each kind of stage draws in another order, so that a branch does not start with the sequences that the seed
    # started with. All mixtures draw in the same order.
    order = zlib.crc32(f"{run.task.kind}/{training.seed}".encode())
    return BlendedSampler(corpus, blend, order)


def _reporter(run: TaskRun, job: TrainingJob, corpus: Corpus, engine: Engine, sampler: BlendedSampler) -> RunReporter:
    """Return the listener of the training, which draws curves and reports progress."""

    def open_writer(step: int) -> CurveWriter:
        return CurveWriter(job.metrics, run.artifact, run.task.name, run.attempt_number, step)

    curves = TrainingCurves(engine, job.metrics, corpus.sequence_length, open_writer)
    left_out = [event.branch for event in job.events if isinstance(event, BranchLeftOut)]
    router_metrics = None if run.lease is None else _router_metrics(job, engine, sampler)
    return RunReporter(engine, run.context, run.emit, curves, job.training.steps, router_metrics, left_out)


def _router_metrics(job: TrainingJob, engine: Engine, sampler: BlendedSampler) -> RouterMetrics | None:
    """Return the metrics of the routers, or None if the model has no routers or no folder at step 0."""
    mixture = as_mixture(engine.model)
    if mixture is None or not mixture.config.mixture_layers or job.initial_folder is None:
        return None
    initial_weights = TensorFiles(sorted(job.initial_folder.glob("model*.safetensors")))
    return RouterMetrics(mixture, job.metrics.routing, initial_weights, tuple(sampler.weights))


def _dynamic_sampler(
    spec: DynamicBlendSpec, corpus: Corpus, sampler: BlendedSampler, engine: Engine, emit: Emit
) -> DynamicBlendSampler:
    """Return a sampler whose blend follows the losses on this rank's share of the held-out rows."""
    ranks, sequences = engine.world_size, spec.settings.sequences
    rows: dict[str, np.ndarray] = {}
    for domain in sampler.weights:
        found = corpus.held_out(domain)
        count = min(len(found), sequences) // ranks * ranks
        if not count:
            raise SettingsError(
                f"mix.dynamic_blend has only {min(len(found), sequences)} held-out sequences of {domain}, fewer than "
                f"the {ranks} processes: raise mix.dynamic_blend.sequences or data.held_out_fraction"
            )
        spread = found[np.arange(count) * len(found) // count]
        rows[domain] = spread[engine.rank :: ranks].astype(np.int64)
    return DynamicBlendSampler(
        sampler,
        spec.settings,
        {domain: torch.from_numpy(mine) for domain, mine in rows.items()},
        lambda domain: spec.reference(domain, rows[domain]),
        engine,
        emit,
    )
