"""Training to an artifact: what seed, branches and mixtures have in common."""

import json
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.leases import Lease
from bam_ray.checkpoint.manifest import Compute, Manifest
from bam_ray.control.tasks import Progress, StageContext
from bam_ray.data import BlendedSampler, Corpus
from bam_ray.settings import Blend, TrainingSettings
from bam_ray.stages.lineage import Place
from bam_ray.training.checkpoints import Checkpoints
from bam_ray.training.engine import Engine
from bam_ray.training.flops import training_flops
from bam_ray.training.loop import Point, train
from bam_ray.training.state import OPTIMIZER

CURVE = "curve.json"


def train_to_artifact(
    place: Place,
    store: BlobStore,
    corpus_folder: Path,
    blend: Blend,
    settings: TrainingSettings,
    model: PreTrainedModel,
    make_engine: Callable[[PreTrainedModel], Engine],
    context: StageContext,
    carried: tuple[Path, ...] = (),
) -> Manifest | None:
    """Train `model` on `blend` and publish it as a Hugging Face folder; called on every rank, None on those above 0.

    `carried` are further files for the folder. Raises `Interrupted` after a checkpoint where the context says stop.
    """
    corpus = Corpus(corpus_folder)
    flops = training_flops(model.config, corpus.sequence_length, settings.steps * settings.batch_tokens)
    engine = make_engine(model)
    task = place.task
    lease = Lease.take(store, place.artifact.prefix) if engine.rank == 0 else None
    checkpoints = Checkpoints(store, task.kind, task.id, lease)
    started = time.monotonic()

    def report(point: Point) -> None:
        if engine.rank == 0:
            context.report(
                Progress(
                    step=point.step,
                    total_steps=settings.steps,
                    loss=point.nll,
                    tokens_per_second=point.tokens_per_second,
                    checkpoint_step=checkpoints.committed_step,
                )
            )

    # Another order a stage, so that a branch does not begin with what the seed began with; the same for all mixtures
    order = zlib.crc32(f"{task.kind}/{settings.seed}".encode())
    sampler = BlendedSampler(corpus, blend, order)
    curve = train(engine, sampler, corpus.sequence_length, settings, checkpoints, report, context.should_stop)
    with tempfile.TemporaryDirectory(prefix="bam-model-") as temporary:
        folder = Path(temporary)
        engine.save(folder)
        if lease is None:
            return None
        (folder / OPTIMIZER).unlink()
        shutil.copytree(corpus.tokenizer_folder, folder, dirs_exist_ok=True)
        for path in carried:
            shutil.copy(path, folder)
        (folder / CURVE).write_text(json.dumps([asdict(point) for point in curve]))
        seconds = sum(settings.batch_tokens / point.tokens_per_second for point in curve)
        lease.check()
        manifest = place.artifact.publish(
            folder,
            Manifest(
                id=task.id,
                kind=task.kind,
                name=task.name,
                parents=task.parents,
                settings={"training": settings.model_dump(mode="json"), "blend": blend},
                step=settings.steps,
                tokens=settings.steps * settings.batch_tokens,
                compute=Compute(
                    flops=flops,
                    device_seconds=round(seconds * engine.world_size, 1),
                    wall_seconds=round(time.monotonic() - started, 1),
                ),
                metrics={"loss/nll": curve[-1].nll},
                facts={"sequences_drawn": sampler.drawn},
                attempt=lease.number,
            ),
        )
    checkpoints.clear()
    return manifest
