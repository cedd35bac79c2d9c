"""One run of a recipe: its settings, the store that holds its artifacts, and its tasks.

    run = PipelineRun.of(recipe, store)
    corpus = run.artifact(ArtifactKind.CORPORA, "corpus")

The driver builds it once. Launchers, stages and the endpoint receive it, so that nothing else builds the task graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.pipeline.tasks import Task
from bam_ray.settings import Recipe


@dataclass(frozen=True)
class PipelineRun:
    """A recipe over a blob store, with all tasks that the recipe consists of."""

    recipe: Recipe
    store: BlobStore
    tasks: Sequence[Task]  # parents first

    @staticmethod
    def of(recipe: Recipe, store: BlobStore) -> "PipelineRun":
        """Return the run of `recipe` over `store`, with the tasks as the recipe describes them."""
        return PipelineRun(recipe, store, task_graph(recipe))

    def task(self, kind: ArtifactKind, name: str) -> Task:
        """Return the task `kind/name`; raises `KeyError` if the recipe has none."""
        return find_task(self.tasks, kind, name)

    def artifact(self, kind: ArtifactKind, name: str) -> Artifact:
        """Return the artifact of the task `kind/name`, which need not be committed yet."""
        return Artifact(self.store, kind, self.task(kind, name).id)
