"""The story, a function a stage: corpus, seed, branch, upcycle, mix, evaluate. Each makes one artifact.

    corpora ─▶ seeds ─▶ branches × N ─▶ upcycled ─▶ mixtures ─▶ reports

`run_stage` is what a worker calls for a stage that needs one process; `run_rank` is what every rank of a group calls.
"""

from collections.abc import Callable

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.pipeline.tasks import StageContext
from bam_ray.settings import Recipe
from bam_ray.stages.corpus import make_corpus
from bam_ray.stages.dense import train_branch, train_seed
from bam_ray.stages.evaluate import evaluate
from bam_ray.stages.mix import train_mixture
from bam_ray.stages.upcycle import upcycle_mixture
from bam_ray.training.engine import Engine

__all__ = ["run_rank", "run_stage", "train_mixture"]

STAGES: dict[ArtifactKind, Callable[[str, Recipe, BlobStore, StageContext], Manifest | None]] = {
    ArtifactKind.CORPORA: make_corpus,
    ArtifactKind.SEEDS: train_seed,
    ArtifactKind.BRANCHES: train_branch,
    ArtifactKind.UPCYCLED: upcycle_mixture,
    ArtifactKind.REPORTS: evaluate,
}
GROUP_STAGES: dict[
    ArtifactKind, Callable[[str, Recipe, BlobStore, StageContext, Callable[..., Engine]], Manifest | None]
] = {
    ArtifactKind.SEEDS: train_seed,
    ArtifactKind.BRANCHES: train_branch,
    ArtifactKind.MIXTURES: train_mixture,
}


def run_stage(kind: ArtifactKind, name: str, recipe: Recipe, store: BlobStore, context: StageContext) -> Manifest:
    """Make the artifact of task `kind/name` in this process, unless it is there; returns its manifest."""
    task = find_task(task_graph(recipe), kind, name)
    manifest = Artifact(store, kind, task.id).manifest() or STAGES[kind](name, recipe, store, context)
    assert manifest is not None  # one process is rank 0
    return manifest


def run_rank(
    kind: ArtifactKind,
    name: str,
    recipe: Recipe,
    store: BlobStore,
    context: StageContext,
    engine_factory: Callable[..., Engine],
) -> Manifest | None:
    """One rank's part in making the artifact of task `kind/name`; returns the manifest on rank 0, None elsewhere.

    `engine_factory(model, training settings)` makes an engine over all ranks; mixtures give it more than that.
    """
    return GROUP_STAGES[kind](name, recipe, store, context, engine_factory)
