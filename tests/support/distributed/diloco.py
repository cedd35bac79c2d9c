"""The functions that ranks execute in the tests of DiLoCo."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.settings import DiLoCoSettings, Recipe
from bam_ray.training.diloco import DiLoCoEngine
from bam_ray.training.engine import EngineSpec
from tests.support.distributed.dense_groups import run_tasks_on_rank
from tests.support.training_run import DENSE, SETTINGS, CountingSampler

OUTER = DiLoCoSettings(workers=2, every=3)


def batch(step: int) -> Tensor:
    """Return the global batch of a step, [4, L]."""
    sampler = CountingSampler()
    sampler.position = 4 * step
    return torch.from_numpy(sampler.take(4)[0])


def diloco_engine() -> DiLoCoEngine:
    """Return an engine over a model with the same initial weights every time."""
    torch.manual_seed(0)
    return DiLoCoEngine(EngineSpec(AutoModelForCausalLM.from_config(DENSE), SETTINGS), OUTER)


def train_copies(folder: str, steps: int, resume_at: int | None) -> tuple[list[Tensor], list[float]]:
    """Train on this rank's part of the batches of `steps` steps.

    At step `resume_at`, the state is written to `folder`, and a new engine continues from it.

    Returns:
        All weights [P] after each step, and the NLL of each step.
    """
    dist.init_process_group("gloo")
    engine, weights, losses = diloco_engine(), [], []
    for step in range(steps):
        if step == resume_at:
            state = engine.state()
            assert (state is not None) == (engine.rank == 0)
            if state is not None:
                state.write(Path(folder))
            dist.barrier()
            engine = diloco_engine()
            engine.load(Path(folder))
        losses.append(engine.step(batch(step)[engine.rank :: 2], 0.01).nll)
        weights.append(torch.cat([each.detach().flatten() for each in engine.parameters.values()]))
    return weights, losses


def run_in_group(run: Recipe, tasks: list[tuple[ArtifactKind, str, int | None]], cache: str) -> list[str]:
    """Do what `run_tasks_on_rank` does, in a process group that exists already, as Ray Train makes it."""
    dist.init_process_group("gloo", init_method="env://", rank=int(os.environ["RANK"]))
    return run_tasks_on_rank(run, tasks, cache)
