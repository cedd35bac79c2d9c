"""The driver of a run whose training steps take a minimal time and can be disturbed.

    python -m tests.support.faults.throttled_driver RECIPE KIND SECONDS [TIMEOUT]

Steps of SECONDS make sure that a fault occurs during training on machines of any speed; the results are not affected.
A file `nan` in a node's folder for temporary files makes the weights of the branch on that node NaN once, as faulty
memory would. The ranks of a group write [node id, process id] to ranks/WORLD_SIZE-RANK.json in the store. If mixing
need not wait for all branches, the last branch starts when a mixture has written its checkpoint of step 5. TIMEOUT is
the number of seconds that a group waits for nodes before it continues with fewer workers.
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
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import BamError
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import EXIT_CODES
from bam_ray.on_ray.run import run_tasks
from bam_ray.on_ray.task_actor import here
from bam_ray.on_ray.work import StageFunctions, run_rank, run_stage
from bam_ray.pipeline.tasks import Progress, StageContext
from bam_ray.scheduling import elastic
from bam_ray.settings import Recipe, load_recipe


class ThrottledContext:
    """A `StageContext` that makes its stage wait at every report."""

    def __init__(self, context: StageContext, seconds: float) -> None:
        self._context = context
        self.node = context.node
        self._seconds = seconds

    def report(self, progress: Progress) -> None:
        """Report, then wait."""
        self._context.report(progress)
        time.sleep(self._seconds)

    def should_stop(self) -> bool:
        """Return True if the stage is asked to stop."""
        return self._context.should_stop()


def throttled_stage(
    seconds: float, kind: ArtifactKind, name: str, recipe: Recipe, store: BlobStore, context: StageContext
) -> object:
    """Do as `stages.run_stage` does; branches have steps of `seconds` and weights that a test can make NaN."""
    if kind != "branches":
        return run_stage(kind, name, recipe, store, context)
    if recipe.upcycle.when != "all" and name == recipe.branch.domains[-1]:
        while not any(key.endswith("00000005/manifest.json") for key in store.list("mixtures/")):
            time.sleep(0.1)
    from bam_ray.training.engine import TorchEngine  # only workers import torch

    with mock.patch.object(TorchEngine, "step", breakable_step(TorchEngine.step)):
        return run_stage(kind, name, recipe, store, ThrottledContext(context, seconds))


def breakable_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return an engine's `step` that first makes a weight NaN if the file `nan` exists, and deletes the file.

    It does not do so again before training is past the step of the last time, because a branch fails if its loss is not
    finite twice at a step.
    """
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


def throttled_rank(
    seconds: float,
    kind: ArtifactKind,
    name: str,
    recipe: Recipe,
    store: BlobStore,
    context: StageContext,
    engine_factory: Any,
) -> object:
    """Do as `stages.run_rank` does, with steps of `seconds`, and write down the node and the process of the rank."""
    import torch.distributed as dist  # only workers import torch

    store.put(f"ranks/{dist.get_world_size()}-{dist.get_rank()}.json", json.dumps([here().id, os.getpid()]).encode())
    return run_rank(kind, name, recipe, store, ThrottledContext(context, seconds), engine_factory)


def main() -> None:
    """Execute the tasks of one kind, and everything that they depend on."""
    recipe, kind, seconds, *timeout = sys.argv[1:]
    elastic.PATIENCE = float(timeout[0]) if timeout else elastic.PATIENCE
    # Workers import these by the name of their module, which is `__main__` for the functions above
    from tests.support.faults.throttled_driver import throttled_rank, throttled_stage

    functions = StageFunctions(
        functools.partial(throttled_stage, float(seconds)), functools.partial(throttled_rank, float(seconds))
    )
    try:
        outcome = run_tasks(load_recipe(recipe), [kind], deepspeed_engine, functions)  # type: ignore[list-item]
    except BamError as error:
        sys.exit(f"error: {error}")
    sys.exit(EXIT_CODES[outcome])


if __name__ == "__main__":
    main()
