"""Publish a trained model: a Hugging Face folder with its tokenizer, its curve and its manifest."""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ComputeCost, Manifest
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.checkpoint.tensors import CHUNK_BYTES, TensorReader, TensorSpec
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.stages.task_run import TaskRun
from bam_ray.stages.training_job import TrainingJob
from bam_ray.training.checkpoints import retry_while_unavailable
from bam_ray.training.engine import Engine
from bam_ray.training.flops import run_flops
from bam_ray.training.loop import FinishedTraining
from bam_ray.upcycling.plan_config import checkpoint_dtype

CURVE = "curve.json"


def published_dtype(initial: TensorReader) -> torch.dtype:
    """Return the dtype in which a model that is trained from `initial` is published: that of `initial`, or fp32.

    Training computes fp32 weights, so a model of a larger dtype is published in fp32.
    """
    dtype = checkpoint_dtype(initial)
    return dtype if dtype.itemsize <= torch.float32.itemsize else torch.float32


def publish_model(
    run: TaskRun, job: TrainingJob, engine: Engine, finished: FinishedTraining, wall_seconds: float
) -> Manifest | None:
    """Commit the model of a finished training. Every rank calls this, and only rank 0 gets the manifest."""
    specs, weights = engine.whole_weights()
    if run.lease is None:
        for _ in weights:  # every rank takes part in the collectives
            pass
        return None
    with scratch_folder("model") as folder:
        write_model(engine.model, specs, weights, folder, job.dtype)
        shutil.copytree(job.corpus.tokenizer_folder, folder, dirs_exist_ok=True)
        for path in job.extra_files:
            shutil.copy(path, folder)
        (folder / CURVE).write_text(json.dumps([asdict(metrics) for metrics in finished.curve]))
        task, settings = run.task, job.training
        manifest = Manifest(
            id=task.id,
            kind=task.kind,
            name=task.name,
            parents=(*task.parents, *job.extra_parents),
            settings={"training": settings.model_dump(mode="json"), "blend": job.blend},
            step=settings.steps,
            tokens=settings.steps * settings.batch_tokens,
            compute=ComputeCost(
                flops=run_flops(engine.model.config, job.corpus.sequence_length, settings, job.expert_history),
                device_seconds=round(finished.device_seconds, 3),
                wall_seconds=round(wall_seconds, 1),
            ),
            metrics={"loss/nll": finished.curve[-1].nll},
            facts={
                "sequences_drawn": job.sampler.drawn,
                "computed_on": [asdict(segment) for segment in finished.segments],
                "refused_checkpoints": finished.refused,
                **job.extra_facts,
            },
            attempt=str(run.lease.number),
        )
        return run.artifact.publish(folder, manifest, run.lease, retry_while_unavailable())


def write_model(
    model: PreTrainedModel, specs: Iterable[TensorSpec], weights: Iterator[Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Write the Hugging Face folder of a model with its weights in `dtype`; checkpoints keep them in fp32.

    Args:
        model: The model, only for its configuration and code.
        specs: The names, dtypes and shapes of the weights.
        weights: The values of the weights in the same order. Only one of them is needed at a time.
        folder: The folder.
        dtype: The dtype of the floating-point weights in the folder.
    """
    model.save_pretrained(folder, state_dict={})

    def produce(spec: TensorSpec) -> Iterator[Tensor]:
        return (part.cpu() for part in next(weights).detach().flatten().split(CHUNK_BYTES // spec.dtype.itemsize))

    stored = [replace(spec, dtype=dtype) if spec.dtype.is_floating_point else spec for spec in specs]
    ModelWriter(open_store(str(folder)), prefetches=False).write_tensors(stored, produce)
    assert next(weights, None) is None
    path = folder / "config.json"  # transformers writes the dtype of the model, which is fp32
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
