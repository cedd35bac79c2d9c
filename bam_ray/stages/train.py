"""Train a model and publish it: the part that seeds, branches, controls and mixtures share."""

import time
import zlib

from bam_ray.checkpoint.manifest import Manifest
from bam_ray.data import BlendedSampler, Corpus
from bam_ray.settings import Blend, TrainingSettings
from bam_ray.stages.publish import publish_model
from bam_ray.stages.task_run import TaskRun
from bam_ray.stages.training_job import TrainingJob
from bam_ray.training.engine import EngineFactory, EngineSpec
from bam_ray.training.loop import Training
from bam_ray.training.objective import as_mixture
from bam_ray.training.reporting import RunReporter, TrainingCurves
from bam_ray.training.router_metrics import RouterMetrics


def train_to_artifact(
    run: TaskRun, job: TrainingJob, spec: EngineSpec, engine_factory: EngineFactory
) -> Manifest | None:
    """Train the model of `spec` in the open attempt of `run`, and publish it as a Hugging Face folder.

    Every rank calls this. It returns the manifest on rank 0 and None on the others. It raises `Interrupted` after it
    has written a checkpoint, if the context asks it to stop.
    """
    settings, sequence_length = job.training, job.corpus.sequence_length
    engine = engine_factory(spec)
    started = time.monotonic()

    mixture, router_metrics = as_mixture(engine.model), None
    if run.lease is not None and mixture is not None and job.initial_weights:
        domains = tuple(job.sampler.weights)
        router_metrics = RouterMetrics(mixture, job.metrics.routing, job.initial_weights, domains)
    curves = TrainingCurves(engine, job.metrics, sequence_length, run.curves(job.metrics))
    reporter = RunReporter(engine, run.context, run.emit, curves, settings.steps, router_metrics, job.events)
    checkpoints = run.checkpoints(settings, reporter.emit, job.extra_files)
    training = Training(engine, job.sampler, sequence_length, settings, checkpoints, reporter)
    run.track_steps(lambda: training.step)

    training.resume()
    finished = training.run()
    manifest = publish_model(run, job, engine, finished, time.monotonic() - started)
    if manifest is not None:
        checkpoints.clear()
    return manifest


def make_sampler(run: TaskRun, corpus: Corpus, blend: Blend, training: TrainingSettings) -> BlendedSampler:
    """Return the sampler of a task's batches, at its first step."""
    # Each kind of stage draws in another order, so that a branch does not start with the sequences that the seed
    # started with. All mixtures draw in the same order.
    order = zlib.crc32(f"{run.task.kind}/{training.seed}".encode())
    return BlendedSampler(corpus, blend, order)
