"""A run's driver, as a job is, but its tasks' steps take a given time at least.

    python -m faults.pace RECIPE SECONDS

So a fault comes in the middle of a branch, however fast the machine is; what is computed is what it always is.
"""

import functools
import sys
import time

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import Kind
from bam_ray.control.tasks import Progress, StageContext
from bam_ray.errors import BamError
from bam_ray.on_ray.job import EXIT_CODES
from bam_ray.on_ray.run import run_tasks
from bam_ray.on_ray.work import StageFunctions
from bam_ray.settings import Recipe, load_recipe


class Paced:
    """A `StageContext` that makes its stage wait at every report."""

    def __init__(self, context: StageContext, seconds: float) -> None:
        self._context = context
        self._seconds = seconds

    def report(self, progress: Progress) -> None:
        self._context.report(progress)
        time.sleep(self._seconds)

    def should_stop(self) -> bool:
        return self._context.should_stop()


def paced_stage(
    seconds: float, kind: Kind, name: str, recipe: Recipe, store: BlobStore, context: StageContext
) -> object:
    """`stages.run_stage`, at that pace."""
    from bam_ray import stages  # torch and transformers: only where they are needed

    return stages.run_stage(kind, name, recipe, store, Paced(context, seconds))


def main() -> None:
    recipe, seconds = load_recipe(sys.argv[1]), float(sys.argv[2])
    # By its module's name, so that workers import it
    from faults.pace import paced_stage

    functions = StageFunctions(run_stage=functools.partial(paced_stage, seconds))
    try:
        outcome = run_tasks(recipe, ["branches"], functions=functions)
    except BamError as error:
        sys.exit(f"error: {error}")
    sys.exit(EXIT_CODES[outcome])


if __name__ == "__main__":
    main()
