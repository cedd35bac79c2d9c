"""Since when branches are waited for, by the wall clock: in the store, so that a controller begun again counts on."""

import math
from collections.abc import Callable
from datetime import UTC, datetime

from bam_ray.blobs import BlobStore
from bam_ray.errors import BlobExists, StoreUnavailable
from bam_ray.pipeline.tasks import Quorum, Task


class Waits:
    """How long tasks with a deadline have waited for branches, `wall` being seconds since 1970."""

    def __init__(self, store: BlobStore, wall: Callable[[], float]) -> None:
        self._store, self._wall = store, wall
        self._since: dict[str, float] = {}

    def seconds(self, task: Task, quorum: Quorum) -> float:
        """Since this was first asked of `task`, by this controller or one before it; 0 where nobody must know."""
        if not 0.0 < quorum.deadline < math.inf:
            return 0.0
        if task.id not in self._since:
            try:
                self._since[task.id] = self._begun(f"{task.kind}/{task.id}/quorum/since.txt")
            except StoreUnavailable:
                return 0.0  # asked again at the next step
        return self._wall() - self._since[task.id]

    def _begun(self, key: str) -> float:
        now = datetime.fromtimestamp(self._wall(), UTC).isoformat()
        try:
            self._store.put_if_absent(key, now.encode())
        except BlobExists:
            now = self._store.get(key).decode()
        return datetime.fromisoformat(now).timestamp()
