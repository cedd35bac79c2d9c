"""The work that an actor is sent: one placed task, the run it belongs to, and what its stage needs besides them.

The stages import torch. They are imported only where they run, so that the driver of a job starts without torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bam_ray.control.transitions import PlacedTask
from bam_ray.pipeline.run import PipelineRun
from bam_ray.pipeline.tasks import StageContext, Task
from bam_ray.stages.task_run import TaskRun

if TYPE_CHECKING:
    from bam_ray.training.engine import EngineFactory


@dataclass(frozen=True)
class StageFunctions:
    """Replacements for the functions that run a stage; None stands for those of `bam_ray.stages.run`."""

    run_stage: Callable[[TaskRun], object] | None = None
    run_rank: "Callable[[TaskRun, EngineFactory], object] | None" = None


@dataclass(frozen=True)
class Work:
    """One placed task with everything that is needed to run it on any node."""

    placed: PlacedTask
    run: PipelineRun
    functions: StageFunctions = field(default_factory=StageFunctions)
    engine_factory: "EngineFactory | None" = None  # makes the engine of a process group
    selector: dict[str, str] = field(default_factory=dict)  # Ray's label selector for the nodes to use

    @property
    def task(self) -> Task:
        """The task, with the resource request that was chosen."""
        return self.placed.task

    def task_run(self, context: StageContext, rank: int = 0) -> TaskRun:
        """Return the value that the stage receives."""
        return TaskRun(self.task, self.run, context, rank, self.placed.number, self.placed.suspect)

    def execute(self, context: StageContext) -> None:
        """Run the stage of the task in this process."""
        run = self.task_run(context)
        if self.functions.run_stage is not None:
            self.functions.run_stage(run)
            return
        from bam_ray.stages.run import run_stage

        run_stage(run)

    def execute_rank(self, context: StageContext, rank: int) -> None:
        """Run one rank's part of the stage; raises `TypeError` if there is no engine factory."""
        if self.engine_factory is None:
            raise TypeError(f"{self.task.full_name} trains on a process group: pass an engine factory to `run_tasks`")
        run = self.task_run(context, rank)
        if self.functions.run_rank is not None:
            self.functions.run_rank(run, self.engine_factory)
            return
        from bam_ray.stages.run import run_rank

        run_rank(run, self.engine_factory)
