"""What an actor is sent: one task, and the functions that do it.

The stages are looked up only where they run, so that the driver of a job imports no torch. Tests send functions of
their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import Kind
from bam_ray.control.tasks import StageContext, Task
from bam_ray.settings import Recipe

EngineFactory = Callable[..., Any]
"""Makes the engine of a mixture's training; comes from `on_deepspeed`, and is only passed on here."""

RunStage = Callable[[Kind, str, Recipe, BlobStore, StageContext], object]
TrainMixture = Callable[[str, Recipe, BlobStore, StageContext, EngineFactory | None], object]


def run_stage(kind: Kind, name: str, recipe: Recipe, store: BlobStore, context: StageContext) -> object:
    """`stages.run_stage`."""
    from bam_ray import stages

    return stages.run_stage(kind, name, recipe, store, context)


def train_mixture(
    name: str, recipe: Recipe, store: BlobStore, context: StageContext, engine_factory: EngineFactory | None
) -> object:
    """`stages.mix.train_mixture`, on one rank of a process group."""
    from bam_ray.stages import mix

    assert engine_factory is not None, "mixtures are trained by an engine of on_deepspeed: jobs pass its factory in"
    return mix.train_mixture(name, recipe, store, context, engine_factory)


@dataclass(frozen=True)
class StageFunctions:
    """What does the work: all kinds but mixtures in one process, mixtures on each rank of a group."""

    run_stage: RunStage = run_stage
    train_mixture: TrainMixture = train_mixture


@dataclass(frozen=True)
class Work:
    """One task, with all that is needed to do it anywhere."""

    task: Task
    recipe: Recipe
    store: BlobStore
    functions: StageFunctions = field(default_factory=StageFunctions)
    engine_factory: EngineFactory | None = None
    selector: dict[str, str] = field(default_factory=dict)  # Ray's label selector for the nodes to use


def is_group(task: Task) -> bool:
    """Whether a group of processes does it, under Ray Train."""
    return task.kind == "mixtures"
