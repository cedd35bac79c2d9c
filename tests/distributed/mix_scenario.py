"""What a rank does in the test of the mix stage."""

import os
from typing import Any

import torch.distributed as dist
from stages.test_story import Context

from bam_ray.blobs import open_store
from bam_ray.errors import Interrupted
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.settings import Recipe
from bam_ray.stages import train_mixture


def mix(run: Recipe, uri: str, stop_at: int | None, cache: str) -> dict[str, Any]:
    """Train the mixture `bam`, stopped and begun again where `stop_at` says so."""
    os.environ["BAM_CACHE"] = cache
    dist.init_process_group("gloo")  # as whoever starts the ranks of a group does: both halves share the experts alike
    context = Context(stop_at)
    try:
        manifest = train_mixture("bam", run, open_store(uri), context, deepspeed_engine)
    except Interrupted:
        dist.barrier()  # rank 0 has written its checkpoint
        context = Context()
        manifest = train_mixture("bam", run, open_store(uri), context, deepspeed_engine)
    last = context.heard[-1]
    return {"id": manifest.id if manifest else None, "steps": last.step, "imbalance": last.load_imbalance}
