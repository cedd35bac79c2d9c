"""What an actor is sent: one task, and the functions that do it.

The stages are looked up only where they run, so that the driver of a job imports no torch. Tests send functions of
their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.pipeline.tasks import StageContext, Task
from bam_ray.settings import Recipe

EngineFactory = Callable[..., Any]
"""Makes the engine of a group's training; comes from `on_deepspeed`, and is only passed on here."""

RunStage = Callable[[ArtifactKind, str, Recipe, BlobStore, StageContext], object]
RunRank = Callable[[ArtifactKind, str, Recipe, BlobStore, StageContext, EngineFactory | None], object]


def run_stage(kind: ArtifactKind, name: str, recipe: Recipe, store: BlobStore, context: StageContext) -> object:
    """`stages.run_stage`."""
    from bam_ray import stages

    return stages.run_stage(kind, name, recipe, store, context)


def run_rank(
    kind: ArtifactKind,
    name: str,
    recipe: Recipe,
    store: BlobStore,
    context: StageContext,
    engine_factory: EngineFactory | None,
) -> object:
    """`stages.run_rank`."""
    from bam_ray import stages

    assert engine_factory is not None, "groups train with an engine of on_deepspeed: jobs pass its factory in"
    return stages.run_rank(kind, name, recipe, store, context, engine_factory)


@dataclass(frozen=True)
class StageFunctions:
    """What does the work: of a task in one process, and on each rank of a group."""

    run_stage: RunStage = run_stage
    run_rank: RunRank = run_rank


@dataclass(frozen=True)
class Work:
    """One task, with all that is needed to do it anywhere."""

    task: Task
    recipe: Recipe
    store: BlobStore
    functions: StageFunctions = field(default_factory=StageFunctions)
    engine_factory: EngineFactory | None = None
    selector: dict[str, str] = field(default_factory=dict)  # Ray's label selector for the nodes to use
