"""The cluster file: a hypothetical cluster, with the number, speed and preemption rate of its nodes.

    name: eight-mixed-nodes
    nodes:
      a100: {count: 2, gpus: 1, accelerator: A100, tflops: 140}
      spot-l4: {count: 4, gpus: 1, accelerator: L4, tflops: 50, preemptions_per_hour: 0.1, replacement_seconds: 600}
    start_seconds: 60
    checkpoint_seconds: 20

The speed of a node is either the `tflops` that one worker sustains, from which tokens per second follow by the size of
the model, or the `tokens_per_second` of one worker that trains a branch.
"""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.scheduling.nodes import ACCELERATOR
from bam_ray.settings import Count, Name, Strict, load_as
from bam_ray.settings.strict import NotNegative, Positive
from bam_ray.units import GIB

STAGE_SECONDS: dict[ArtifactKind, float] = {
    ArtifactKind.CORPORA: 600.0,
    ArtifactKind.SEEDS: 60.0,
    ArtifactKind.ADAPTERS: 600.0,  # if the number of topics is not known
    ArtifactKind.UPCYCLED: 120.0,
    ArtifactKind.TOPICS: 600.0,
    ArtifactKind.EVALUATIONS: 600.0,
    ArtifactKind.REPORTS: 600.0,
}
"""Assumed durations of the stages that do not train, used if the cluster file states none."""


class NodeGroup(Strict):
    """A number of nodes of one kind."""

    count: Count
    """Number of nodes."""
    cpus: Positive = 8.0
    """CPUs of each node."""
    gpus: NotNegative = 0.0
    """GPUs of each node."""
    memory_gib: Positive = 64.0
    """Memory of each node in GiB."""
    accelerator: str | None = None
    """Value of Ray's label `ray.io/accelerator-type`."""
    device_memory_gib: Positive | None = None
    """Memory of one GPU in GiB."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of each node."""
    tflops: Positive | None = None
    """Teraflops per second that one worker sustains."""
    tokens_per_second: Positive | None = None
    """Tokens per second of one worker that trains a branch."""
    preemptions_per_hour: NotNegative = 0.0
    """Mean number of preemptions of each node per hour."""
    replacement_seconds: NotNegative = 300.0
    """Time until a preempted node is replaced."""

    @model_validator(mode="after")
    def _one_speed(self) -> Self:
        if (self.tflops is None) == (self.tokens_per_second is None):
            raise ValueError("give exactly one of `tflops` and `tokens_per_second`")
        return self

    @property
    def resources(self) -> dict[str, float]:
        """The resources of each node as Ray counts them; memory is in bytes."""
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_gib * GIB}

    @property
    def all_labels(self) -> dict[str, str]:
        """The labels of each node, including the label of the accelerator."""
        return {ACCELERATOR: self.accelerator, **self.labels} if self.accelerator else self.labels


class ClusterFile(Strict):
    """A cluster, and the durations of starts, checkpoints and stages on it."""

    name: Name
    """Name of the cluster."""
    nodes: dict[Name, NodeGroup]
    """The node groups by name."""
    start_seconds: NotNegative = 60.0
    """Time from the placement of a task to its first step: start of the process, data and weights."""
    checkpoint_seconds: NotNegative = 20.0
    """Time from the last step until a checkpoint or a model is in the blob store."""
    stage_seconds: dict[ArtifactKind, NotNegative] = Field(default_factory=lambda: dict(STAGE_SECONDS))
    """Durations of the stages that do not train."""


def load_cluster(path: str | Path) -> ClusterFile:
    """Read the cluster file at `path`; raise `SettingsError` if it cannot be read or is invalid."""
    return load_as(ClusterFile, path, "cluster file")
