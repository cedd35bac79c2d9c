"""Elastic groups: a group that lost nodes for good continues with fewer workers and the same global batch."""

from collections.abc import Callable
from dataclasses import replace

from bam_ray.pipeline.tasks import Task

SHRINK_TIMEOUT = 120.0  # seconds that a group waits for all of its workers before it continues with fewer


def with_fewer_workers(task: Task, can_hold: Callable[[Task], bool]) -> Task | None:
    """Return `task` with the best of its smaller worker counts that the nodes can hold, or None if there is none."""
    candidates = (replace(task, workers=number) for number in task.fewer_workers)
    return next(filter(can_hold, candidates), None)
