"""A run's driver, as a job is, but a step of its training takes a given time at least, and can be disturbed.

    python -m faults.pace RECIPE KIND SECONDS [PATIENCE]

So a fault comes in the middle of the training, however fast the machine is; what is computed is what it always is.
A file `nan` in a node's folder for temporary files breaks the weights of the branch on it, once, as bad memory might.
Ranks of groups write down where they are, [node id, process id], as ranks/<of how many>-<rank>.json in the store.
Where mixing need not wait for all branches, the last of them begins when a mixture has been trained for a while.
PATIENCE is how many seconds a group waits for nodes before it goes on with fewer.
"""

import functools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import Kind
from bam_ray.errors import BamError
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import EXIT_CODES
from bam_ray.on_ray.run import run_tasks
from bam_ray.on_ray.task_actor import here
from bam_ray.on_ray.work import StageFunctions, run_rank, run_stage
from bam_ray.pipeline.tasks import Progress, StageContext
from bam_ray.scheduling import elastic
from bam_ray.settings import Recipe, load_recipe


class Paced:
    """A `StageContext` that makes its stage wait at every report."""

    def __init__(self, context: StageContext, seconds: float) -> None:
        self._context = context
        self.node = context.node
        self._seconds = seconds

    def report(self, progress: Progress) -> None:
        self._context.report(progress)
        time.sleep(self._seconds)

    def should_stop(self) -> bool:
        return self._context.should_stop()


def paced_stage(
    seconds: float, kind: Kind, name: str, recipe: Recipe, store: BlobStore, context: StageContext
) -> object:
    """`stages.run_stage`; branches at that pace, and with weights that can be broken."""
    if kind != "branches":
        return run_stage(kind, name, recipe, store, context)
    if recipe.upcycle.when != "all" and name == recipe.branch.domains[-1]:
        while not any(key.endswith("00000005/manifest.json") for key in store.list("mixtures/")):
            time.sleep(0.1)
    from bam_ray.training.engine import TorchEngine  # torch: on workers alone

    with mock.patch.object(TorchEngine, "step", breakable(TorchEngine.step)):
        return run_stage(kind, name, recipe, store, Paced(context, seconds))


def breakable(step: Callable[..., Any]) -> Callable[..., Any]:
    """An engine's `step` that makes a weight NaN before it, where the file `nan` says so; not again before training is
    past the steps done then, for a loss that is not finite twice ends a branch."""
    mark = Path(tempfile.gettempdir()) / "nan"
    broken_at = -1

    def stepping(engine: Any, *batch: Any) -> Any:
        nonlocal broken_at
        if engine._updates > broken_at and mark.exists():
            mark.unlink()
            broken_at = engine._updates
            next(iter(engine.parameters.values())).data.fill_(math.nan)
        return step(engine, *batch)

    return stepping


def paced_rank(
    seconds: float,
    kind: Kind,
    name: str,
    recipe: Recipe,
    store: BlobStore,
    context: StageContext,
    engine_factory: Any,
) -> object:
    """`stages.run_rank`, at that pace."""
    import torch.distributed as dist  # on workers alone

    store.put(f"ranks/{dist.get_world_size()}-{dist.get_rank()}.json", json.dumps([here().id, os.getpid()]).encode())
    return run_rank(kind, name, recipe, store, Paced(context, seconds), engine_factory)


def main() -> None:
    recipe, kind, seconds, *patience = sys.argv[1:]
    elastic.PATIENCE = float(patience[0]) if patience else elastic.PATIENCE
    # By their module's name, so that workers import them
    from faults.pace import paced_rank, paced_stage

    functions = StageFunctions(
        functools.partial(paced_stage, float(seconds)), functools.partial(paced_rank, float(seconds))
    )
    try:
        outcome = run_tasks(load_recipe(recipe), [kind], deepspeed_engine, functions)  # type: ignore[list-item]
    except BamError as error:
        sys.exit(f"error: {error}")
    sys.exit(EXIT_CODES[outcome])


if __name__ == "__main__":
    main()
