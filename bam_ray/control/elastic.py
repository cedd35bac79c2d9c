"""Groups that have lost nodes for good: with how many workers they go on, at the same global batch. Pure functions."""

from collections.abc import Callable
from dataclasses import replace
from math import gcd

from bam_ray.control.tasks import Task

PATIENCE = 120.0  # seconds that a group waits for all its workers, before it goes on with fewer


def fewer_workers(workers: int, least: int | None, sequences: int, expert_parallel: int = 1) -> tuple[int, ...]:
    """Numbers of workers that will do in place of `workers`, best first; none where `least` is None.

    They share `sequences` alike: the global batch, or of mixtures `MixSettings.alike`. Experts are spread over the
    greatest common divisor of their number and `expert_parallel`, which is taken as large as can be: a worker's memory
    was meant for its part of the experts.
    """
    numbers = [number for number in range(least or workers, workers) if sequences % number == 0]
    return tuple(sorted(numbers, key=lambda number: (gcd(number, expert_parallel), number), reverse=True))


def shrunk(task: Task, can_hold: Callable[[Task], bool]) -> Task | None:
    """`task` with the best of its fewer workers that nodes could hold, None where they can hold none of them."""
    sizes = (replace(task, workers=number) for number in task.fewer_workers)
    return next(filter(can_hold, sizes), None)
