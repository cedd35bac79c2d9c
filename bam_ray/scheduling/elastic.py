"""Groups that have lost nodes for good: with how many workers they go on, at the same global batch. Pure functions."""

from collections.abc import Callable
from dataclasses import replace

from bam_ray.pipeline.tasks import Task

PATIENCE = 120.0  # seconds that a group waits for all its workers, before it goes on with fewer


def shrunk(task: Task, can_hold: Callable[[Task], bool]) -> Task | None:
    """`task` with the best of its fewer workers that nodes could hold, None where they can hold none of them."""
    sizes = (replace(task, workers=number) for number in task.fewer_workers)
    return next(filter(can_hold, sizes), None)
