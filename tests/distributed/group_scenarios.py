"""What the ranks of a seed's or a branch's group do, in processes that a test starts."""

import os

import torch.distributed as dist
from stages.test_story import Context

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import Interrupted
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.settings import Recipe
from bam_ray.stages import run_rank


def make_together(run: Recipe, tasks: list[tuple[ArtifactKind, str, int | None]], cache: str) -> list[str]:
    """Make the artifacts of `tasks`, or stop after a step -> how each ended on this rank."""
    os.environ["BAM_CACHE"] = cache
    said = []
    for kind, name, stop_at in tasks:
        context = Context(stop_at)
        try:
            manifest = run_rank(kind, name, run, open_store(run.store.uri), context, deepspeed_engine)
        except Interrupted as error:
            said.append(str(error))
            dist.barrier()  # rank 0 has its checkpoint written
        else:
            said.append("nothing" if manifest is None else manifest.id)
            dist.barrier()
    return said
