"""The functions that ranks execute in the tests of the mix stage."""

import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from bam_ray.blobs import open_store
from bam_ray.errors import Interrupted
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.settings import Recipe
from bam_ray.stages import run_stage, train_mixture
from bam_ray.stages.absorb import others_wait
from tests.support.distributed.unreadable_checkpoints import unreadable
from tests.support.stage_run import (
    RecordingContext,
)


def train_and_resume(run: Recipe, uri: str, stop_at: int | None, cache: str) -> dict[str, Any]:
    """Train the mixture `bam`; with `stop_at`, stop at that step and resume in a second attempt."""
    os.environ["BAM_CACHE"] = cache
    # The process that starts ranks does this, so that both attempts spread the experts in the same way
    dist.init_process_group("gloo")
    context = RecordingContext(stop_at)
    try:
        manifest = train_mixture("bam", run, open_store(uri), context, deepspeed_engine)
    except Interrupted:
        dist.barrier()  # wait until rank 0 has written its checkpoint
        context = RecordingContext()
        manifest = train_mixture("bam", run, open_store(uri), context, deepspeed_engine)
    last = context.reports[-1]
    found = {"steps": last.step, "imbalance": last.load_imbalance, "curves": dict(last.curves)}
    return {"id": manifest.id if manifest else None, **found}


def absorb_late_branch(run: Recipe, uri: str, stops: tuple[int | None, ...], cache: str) -> dict[str, Any]:
    """Train the mixture `bam` in one attempt for each of `stops`; a late branch arrives after the first attempt."""
    os.environ["BAM_CACHE"] = cache
    dist.init_process_group("gloo")
    store = open_store(uri)
    experts = []  # the number of experts that each attempt held on this rank
    for number, stop_at in enumerate(stops):
        if number == 1 and dist.get_rank() == 0:
            run_stage("branches", "general", run, store, RecordingContext())
        dist.barrier()
        context = RecordingContext(stop_at)
        engines: list[Any] = []

        def factory(*arguments: Any, engines: list[Any] = engines) -> Any:
            engines.append(deepspeed_engine(*arguments))
            return engines[-1]

        try:
            with unreadable((1, 7)):  # all ranks resume from the checkpoint before it
                train_mixture("bam", run, store, context, factory)
        except Interrupted:
            dist.barrier()  # wait until rank 0 has written its checkpoint
        experts.append(len(engines[0].model.model.layers[0].mlp.experts.down_proj))
    return {"experts": context.reports[-1].experts, "shared": experts}


def wait_for_rank_0(timeout: float) -> float:
    """Let rank 0 work for longer than `timeout`, the seconds that collectives of the default process group wait.

    Returns:
        The time when rank 0 had finished its work, or when another rank had waited for it.
    """
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    with others_wait():
        if dist.get_rank() == 0:
            time.sleep(1.5 * timeout)
            done = time.time()
    return done if dist.get_rank() == 0 else time.time()
