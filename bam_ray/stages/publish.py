"""Publish a trained model: a Hugging Face folder with its tokenizer, its curve and its manifest."""

import json
import shutil
from dataclasses import asdict

from bam_ray.checkpoint.manifest import ComputeCost, Manifest
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.stages.task_run import TaskRun
from bam_ray.stages.training_job import TrainingJob
from bam_ray.training.checkpoints import retry_while_unavailable
from bam_ray.training.engine import Engine
from bam_ray.training.flops import run_flops
from bam_ray.training.loop import FinishedTraining

CURVE = "curve.json"


def publish_model(
    run: TaskRun, job: TrainingJob, engine: Engine, finished: FinishedTraining, wall_seconds: float
) -> Manifest | None:
    """Commit the model of a finished training. Every rank calls this, and only rank 0 gets the manifest."""
    state = engine.state()
    if state is None or run.lease is None:
        return None
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
            device_seconds=round(finished.device_seconds, 1),
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
    with scratch_folder("model") as folder:
        state.write_model(folder)
        shutil.copytree(job.corpus.tokenizer_folder, folder, dirs_exist_ok=True)
        for path in job.extra_files:
            shutil.copy(path, folder)
        (folder / CURVE).write_text(json.dumps([asdict(metrics) for metrics in finished.curve]))
        return retry_while_unavailable()(run.artifact.publish, folder, manifest, run.lease)
