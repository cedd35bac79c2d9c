"""A run's driver, as a job is, but every step of its groups takes a while, and each rank says where it is.

    python paced.py RECIPE KIND STEP_SECONDS [PATIENCE]

So a fault comes in the middle of the training, however fast the machine is; what is computed is what it always is.
Where mixing need not wait for all branches, the last of them begins when a mixture has been trained for a while.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import Kind
from bam_ray.control import elastic
from bam_ray.control.tasks import Progress, StageContext
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.run import run_tasks
from bam_ray.on_ray.task_actor import here
from bam_ray.on_ray.work import StageFunctions, run_rank, run_stage
from bam_ray.settings import Recipe, load_recipe


class Paced:
    """A `StageContext` whose reports take a while."""

    def __init__(self, context: StageContext, seconds: float) -> None:
        self._context = context
        self._seconds = seconds

    def report(self, progress: Progress) -> None:
        self._context.report(progress)
        time.sleep(self._seconds)

    def should_stop(self) -> bool:
        return self._context.should_stop()


def stage(kind: Kind, name: str, recipe: Recipe, store: BlobStore, context: StageContext) -> object:
    """`stages.run_stage`, its cache beside the store."""
    os.environ["BAM_CACHE"] = str(Path(store.uri).with_name("cache"))
    if kind == "branches" and recipe.upcycle.when != "all" and name == recipe.branch.domains[-1]:
        while not any(key.endswith("00000005/manifest.json") for key in store.list("mixtures/")):
            time.sleep(0.1)
    return run_stage(kind, name, recipe, store, context)


def rank(
    seconds: float,
    kind: Kind,
    name: str,
    recipe: Recipe,
    store: BlobStore,
    context: StageContext,
    engine_factory: Any,
) -> object:
    """`stages.run_rank`, its cache beside the store; [node id, process id] lie in the store."""
    os.environ["BAM_CACHE"] = str(Path(store.uri).with_name("cache"))
    store.put(f"ranks/{dist.get_world_size()}-{dist.get_rank()}.json", json.dumps([here().id, os.getpid()]).encode())
    return run_rank(kind, name, recipe, store, Paced(context, seconds), engine_factory)


if __name__ == "__main__":
    recipe_file, kind, step_seconds, *patience = sys.argv[1:]
    elastic.PATIENCE = float(patience[0]) if patience else elastic.PATIENCE
    functions = StageFunctions(stage, functools.partial(rank, float(step_seconds)))
    outcome = run_tasks(load_recipe(recipe_file), [kind], deepspeed_engine, functions)  # type: ignore[list-item]
    sys.exit(outcome != "finished")
