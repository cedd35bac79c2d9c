"""The deadlines for late branches.

The start of each deadline is kept in the blob store, in wall-clock time, so that it outlives the controller.
"""

import math
from collections.abc import Callable
from datetime import UTC, datetime

from bam_ray.blobs import BlobStore
from bam_ray.errors import BlobExists, StoreError
from bam_ray.pipeline.tasks import Task


class QuorumDeadlines:
    """The time for which tasks have waited for branches.

    Args:
        store: The blob store of the run.
        wall: Returns the wall-clock time in seconds since 1970.
    """

    def __init__(self, store: BlobStore, wall: Callable[[], float]) -> None:
        self._store, self._wall = store, wall
        self._since: dict[str, float] = {}

    def start(self, task: Task) -> None:
        """Start the deadline of `task`, unless this controller or an earlier one has; do nothing if it has none.

        If the blob store fails, the deadline does not start; call again at the next step.
        """
        if task.id in self._since or task.quorum is None or not 0.0 < task.quorum.deadline < math.inf:
            return
        try:
            self._since[task.id] = self._put_if_absent(f"{task.kind}/{task.id}/quorum/since.txt")
        except StoreError:
            return

    def waited(self, task: Task) -> float:
        """Return the seconds since the deadline of `task` started; 0 if it has not started."""
        since = self._since.get(task.id)
        return 0.0 if since is None else self._wall() - since

    def _put_if_absent(self, key: str) -> float:
        now = datetime.fromtimestamp(self._wall(), UTC).isoformat()
        try:
            self._store.put_if_absent(key, now.encode())
        except BlobExists:
            now = self._store.get(key).decode()
        return datetime.fromisoformat(now).timestamp()
