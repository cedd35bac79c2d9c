"""The story, a function a stage: corpus, seed, branch, upcycle, mix, evaluate. Each makes one artifact.

    corpora ─▶ seeds ─▶ branches × N ─▶ upcycled ─▶ mixtures ─▶ reports

`run_stage` is what a worker calls for a stage that needs one process; `train_mixture` runs on every rank of a group.
"""

from collections.abc import Callable

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import Kind, Manifest
from bam_ray.control.graph import find_task, task_graph
from bam_ray.control.tasks import StageContext
from bam_ray.settings import Recipe
from bam_ray.stages.corpus import make_corpus
from bam_ray.stages.dense import train_branch, train_seed
from bam_ray.stages.evaluate import evaluate
from bam_ray.stages.mix import train_mixture
from bam_ray.stages.upcycle import upcycle_mixture

__all__ = ["run_stage", "train_mixture"]

Stage = Callable[[str, Recipe, BlobStore, StageContext], Manifest]

STAGES: dict[Kind, Stage] = {
    "corpora": make_corpus,
    "seeds": train_seed,
    "branches": train_branch,
    "upcycled": upcycle_mixture,
    "reports": evaluate,
}


def run_stage(kind: Kind, name: str, recipe: Recipe, store: BlobStore, context: StageContext) -> Manifest:
    """Make the artifact of task `kind/name` in this process, unless it is there; returns its manifest."""
    task = find_task(task_graph(recipe), kind, name)
    return Artifact(store, kind, task.id).manifest() or STAGES[kind](name, recipe, store, context)
