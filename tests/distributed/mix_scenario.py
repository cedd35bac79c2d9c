"""What a rank does in the test of the mix stage."""

import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from agreeing_scenario import unreadable
from stages.test_story import Context

from bam_ray.blobs import open_store
from bam_ray.errors import Interrupted
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.settings import Recipe
from bam_ray.stages import run_stage, train_mixture
from bam_ray.stages.absorb import others_wait


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
    found = {"steps": last.step, "imbalance": last.load_imbalance, "curves": dict(last.curves)}
    return {"id": manifest.id if manifest else None, **found}


def absorb(run: Recipe, uri: str, stops: tuple[int | None, ...], cache: str) -> dict[str, Any]:
    """Train the mixture `bam` in as many attempts as there are `stops`; after the first a late branch arrives."""
    os.environ["BAM_CACHE"] = cache
    dist.init_process_group("gloo")
    store = open_store(uri)
    shared = []  # experts that each attempt had on this rank
    for number, stop_at in enumerate(stops):
        if number == 1 and dist.get_rank() == 0:
            run_stage("branches", "general", run, store, Context())
        dist.barrier()
        context, engines = Context(stop_at), []

        def factory(*arguments: Any, engines: list[Any] = engines) -> Any:
            engines.append(deepspeed_engine(*arguments))
            return engines[-1]

        try:
            with unreadable((1, 7)):  # all ranks begin with the one before it
                train_mixture("bam", run, store, context, factory)
        except Interrupted:
            dist.barrier()  # rank 0 has written its checkpoint
        shared.append(len(engines[0].model.model.layers[0].mlp.experts.down_proj))
    return {"experts": context.heard[-1].experts, "shared": shared}


def wait_for_rank_0(patience: float) -> float:
    """Rank 0 is at it for longer than the ranks' own group waits -> when this rank got past it, or rank 0 was done."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=patience))
    with others_wait():
        if dist.get_rank() == 0:
            time.sleep(1.5 * patience)
            done = time.time()
    return done if dist.get_rank() == 0 else time.time()
