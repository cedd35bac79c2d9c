"""A stage's place in the run: its task, and the artifacts it is made from."""

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.pipeline.tasks import Task
from bam_ray.settings import Recipe


class Place:
    """The task `kind/name` of a recipe over a store."""

    def __init__(self, recipe: Recipe, store: BlobStore, kind: ArtifactKind, name: str) -> None:
        self._tasks = task_graph(recipe)
        self._store = store
        self.task: Task = find_task(self._tasks, kind, name)
        self.artifact = Artifact(store, kind, self.task.id)

    def other(self, kind: ArtifactKind, name: str) -> Artifact:
        """The artifact of another task of the same run."""
        return Artifact(self._store, kind, find_task(self._tasks, kind, name).id)
