"""Run the stage of a task: `run_stage` in one process, `run_rank` on every rank of a process group."""

from collections.abc import Callable

from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.stages.adapters import train_adapters
from bam_ray.stages.corpus import make_corpus
from bam_ray.stages.dense import train_branch, train_control, train_seed
from bam_ray.stages.evaluate import evaluate
from bam_ray.stages.evaluate_adapters import evaluate_adapters
from bam_ray.stages.mix import train_mixture
from bam_ray.stages.task_run import TaskRun
from bam_ray.stages.topics import make_topics
from bam_ray.stages.upcycle import upcycle_mixture
from bam_ray.training.engine import EngineFactory

STAGES: dict[ArtifactKind, Callable[[TaskRun], Manifest | None]] = {
    ArtifactKind.CORPORA: make_corpus,
    ArtifactKind.SEEDS: train_seed,
    ArtifactKind.BRANCHES: train_branch,
    ArtifactKind.CONTROLS: train_control,
    ArtifactKind.TOPICS: make_topics,
    ArtifactKind.ADAPTERS: train_adapters,
    ArtifactKind.EVALUATIONS: evaluate_adapters,
    ArtifactKind.UPCYCLED: upcycle_mixture,
    ArtifactKind.REPORTS: evaluate,
}
GROUP_STAGES: dict[ArtifactKind, Callable[[TaskRun, EngineFactory], Manifest | None]] = {
    ArtifactKind.SEEDS: train_seed,
    ArtifactKind.BRANCHES: train_branch,
    ArtifactKind.CONTROLS: train_control,
    ArtifactKind.MIXTURES: train_mixture,
}


def run_stage(run: TaskRun) -> Manifest:
    """Make the artifact of the task in this process, unless it is committed already, and return its manifest."""
    manifest = run.finished() or STAGES[run.task.kind](run)
    assert manifest is not None  # one process is rank 0
    return manifest


def run_rank(run: TaskRun, engine_factory: EngineFactory) -> Manifest | None:
    """Do one rank's part of the task; returns the manifest on rank 0 and None on the others.

    `engine_factory` makes an engine over all ranks of the process group.
    """
    return GROUP_STAGES[run.task.kind](run, engine_factory)
