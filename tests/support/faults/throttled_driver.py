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
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from bam_ray.errors import BamError
from bam_ray.on_deepspeed import deepspeed_engine
from bam_ray.on_ray.job import EXIT_CODES
from bam_ray.on_ray.run import run_tasks
from bam_ray.on_ray.work import StageFunctions
from bam_ray.on_ray.worker_env import current_node
from bam_ray.pipeline.tasks import Progress, StageContext
from bam_ray.scheduling import elastic
from bam_ray.settings import load_recipe
from bam_ray.stages.task_run import TaskRun


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


def throttled_stage(seconds: float, run: TaskRun) -> object:
    """Do as `stages.run.run_stage` does; branches have steps of `seconds` and weights that a test can make NaN."""
    from bam_ray.stages.run import run_stage  # only workers import torch

    if run.task.kind != "branches":
        return run_stage(run)
    if run.recipe.upcycle.when != "all" and run.task.name == run.recipe.branch.domains[-1]:
        while not any(key.endswith("00000005/manifest.json") for key in run.store.list("mixtures/")):
            time.sleep(0.1)
    from bam_ray.training.torch_engine import TorchEngine

    with mock.patch.object(TorchEngine, "step", breakable_step(TorchEngine.step)):
        return run_stage(replace(run, context=ThrottledContext(run.context, seconds)))


def breakable_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return an engine's `step` that first makes a weight NaN if the file `nan` exists, and deletes the file.

    It does not do so again before training is past the step of the last time, because a branch fails if its loss is not
    finite twice at a step.
    """
    mark = Path(tempfile.gettempdir()) / "nan"
    broken_at = -1

    def stepping(engine: Any, *batch: Any) -> Any:
        nonlocal broken_at
        if engine.updates > broken_at and mark.exists():
            mark.unlink()
            broken_at = engine.updates
            next(iter(engine.parameters.values())).data.fill_(math.nan)
        return step(engine, *batch)

    return stepping


def throttled_rank(seconds: float, run: TaskRun, engine_factory: Any) -> object:
    """Do as `stages.run.run_rank` does, with steps of `seconds`, and record the node and the process of the rank."""
    import torch.distributed as dist  # only workers import torch

    from bam_ray.stages.run import run_rank

    where = json.dumps([current_node().id, os.getpid()]).encode()
    run.store.put(f"ranks/{dist.get_world_size()}-{run.rank}.json", where)
    return run_rank(replace(run, context=ThrottledContext(run.context, seconds)), engine_factory)


def main() -> None:
    """Execute the tasks of one kind, and everything that they depend on."""
    recipe, kind, seconds, *timeout = sys.argv[1:]
    elastic.SHRINK_TIMEOUT = float(timeout[0]) if timeout else elastic.SHRINK_TIMEOUT
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
