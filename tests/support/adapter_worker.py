"""A process that trains a task of adapters and kills itself: `python -m tests.support.adapter_worker RECIPE TASK STEP`.

RECIPE is the path of the recipe as JSON. The process ends by SIGKILL when it reports STEP or a later one.
"""

import os
import signal
import sys
from pathlib import Path

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.pipeline.tasks import Progress
from bam_ray.settings import Recipe
from tests.support.stage_run import RecordingContext, run_task


class KilledAt(RecordingContext):
    """A context whose process is killed at the step `kill_at`."""

    kill_at = 0

    def report(self, progress: Progress) -> None:
        """Kill this process if it is time."""
        if progress.step >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    path, task, step = sys.argv[1:]
    recipe = Recipe.model_validate_json(Path(path).read_bytes())
    context = KilledAt()
    context.kill_at = int(step)
    run_task(recipe, open_store(recipe.store.uri), ArtifactKind.ADAPTERS, task, context)
