"""The store as the controller sees it: which artifacts are committed, and which of them other drivers make.

The driver is the part of a run that must not die of an outage. A store that does not answer, or that denies a request,
is asked again at the next step of the controller. Only if it has failed for ten minutes without a break, its error ends
the run.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ManifestGeneration
from bam_ray.control.drivers import Drivers
from bam_ray.errors import StoreError
from bam_ray.pipeline.tasks import Task

STORE_PATIENCE = 600.0  # seconds for which the store may fail before its error ends the run
LOOK_SECONDS = 5.0  # between two looks at the leases of a task that is ready
MAX_REQUESTS = 16

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class StoredTask:
    """The view of a task in the store: it is committed, or another driver makes it, or neither."""

    generation: int | None = None  # the number of the committed generation of its artifact
    driver: str | None = None


class StoreWatch:
    """The store of a run. No method waits for a store that fails.

    Args:
        store: The store.
        drivers: This driver and the others.
        clock: Returns the time in seconds, from any origin.
    """

    def __init__(self, store: BlobStore, drivers: Drivers, clock: Callable[[], float]) -> None:
        self._store, self._drivers, self._clock = store, drivers, clock
        self._failing_since: float | None = None
        self._looked_at: dict[str, float] = {}  # by task id
        self.warning = ""  # about the failure in progress; empty if the store answers

    def ask(self, operation: Callable[[], Answer]) -> Answer | None:
        """Return the answer to an operation on the store, or None if the store fails.

        Raises:
            StoreError: The store has failed for `STORE_PATIENCE` seconds.
        """
        try:
            answer = operation()
        except StoreError as error:
            now = self._clock()
            self._failing_since = now if self._failing_since is None else self._failing_since
            self.warning = str(error)
            if now - self._failing_since > STORE_PATIENCE:
                raise
            return None
        self._failing_since, self.warning = None, ""
        return answer

    def generations(self, tasks: Iterable[Task]) -> dict[str, ManifestGeneration | None]:
        """Return the generations of artifacts, by task id; None for those of which the store does not say."""
        listed = list(tasks)
        if not listed:
            return {}
        with ThreadPoolExecutor(max_workers=MAX_REQUESTS) as pool:
            answers = pool.map(lambda task: self.ask(self._artifact(task).generation), listed)
            return {task.id: answer for task, answer in zip(listed, answers, strict=True)}

    def look_for_others(self, tasks: Iterable[Task]) -> dict[str, StoredTask]:
        """Return what the store shows of `tasks`, by task id.

        A task is looked at every `LOOK_SECONDS`. The tasks that are not looked at now, and those of which the store
        does not say, are missing in the result.
        """
        now = self._clock()
        due = [task for task in tasks if now - self._looked_at.get(task.id, float("-inf")) >= LOOK_SECONDS]
        if not due:
            return {}
        self.ask(lambda: self._drivers.refresh(at_once=True))  # another one may have begun a task in this moment
        self._looked_at.update((task.id, now) for task in due)
        with ThreadPoolExecutor(max_workers=MAX_REQUESTS) as pool:
            answers = pool.map(lambda task: self.ask(lambda: self._look(task)), due)
            return {task.id: answer for task, answer in zip(due, answers, strict=True) if answer is not None}

    def _look(self, task: Task) -> StoredTask:
        artifact = self._artifact(task)
        generation = artifact.generation()
        if generation.committed:
            return StoredTask(generation=generation.number)
        return StoredTask(driver=self._drivers.owner_of(artifact.prefix))

    def _artifact(self, task: Task) -> Artifact:
        return Artifact(self._store, task.kind, task.id)
