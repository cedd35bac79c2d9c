"""The function that ranks execute in the tests of seeds and branches that several processes train."""

import os

import torch.distributed as dist

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import Interrupted
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.settings import Recipe
from bam_ray.stages.run import run_rank
from tests.support.stage_run import RecordingContext, task_run


def run_tasks_on_rank(run: Recipe, tasks: list[tuple[ArtifactKind, str, int | None]], cache: str) -> list[str]:
    """Execute `tasks`, given as (kind, name, step to stop at), on this rank.

    Returns:
        For each task the identity of the artifact that this rank committed, "nothing" if another rank did that, or the
        message of `Interrupted`.
    """
    os.environ["BAM_CACHE"] = cache
    store, rank = open_store(run.store.uri), int(os.environ["RANK"])
    outcomes = []
    for kind, name, stop_at in tasks:
        context = RecordingContext(stop_at)
        try:
            manifest = run_rank(task_run(run, store, kind, name, context, rank), deepspeed_engine)
        except Interrupted as error:
            outcomes.append(str(error))
            dist.barrier()  # wait until rank 0 has written its checkpoint
        else:
            outcomes.append("nothing" if manifest is None else manifest.id)
            dist.barrier()
    return outcomes
