"""A cluster as a file, for clusters that are not there: which nodes, how fast, how often they are taken away.

    name: eight-mixed-nodes
    nodes:
      a100: {count: 2, gpus: 1, accelerator: A100, tflops: 140}
      spot-l4: {count: 4, gpus: 1, accelerator: L4, tflops: 50, preemptions_per_hour: 0.1, replacement_seconds: 600}
    start_seconds: 60
    checkpoint_seconds: 20

Speed is either what one worker sustains in `tflops` (then tokens a second follow from the size of the model), or the
`tokens_per_second` of one worker that trains a branch.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.scheduling.nodes import ACCELERATOR
from bam_ray.settings import Count, Name, Strict, load_as

Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
STAGE_SECONDS: dict[ArtifactKind, float] = {
    ArtifactKind.CORPORA: 600.0,
    ArtifactKind.SEEDS: 60.0,
    ArtifactKind.UPCYCLED: 120.0,
    ArtifactKind.REPORTS: 600.0,
}
"""Of stages that do not train, where nothing is known of their length: assumptions."""


class NodeGroup(Strict):
    """Nodes of one kind."""

    count: Count
    cpus: Positive = 8.0
    gpus: NotNegative = 0.0
    memory_gib: Positive = 64.0
    accelerator: str | None = None  # Ray's label ray.io/accelerator-type
    device_memory_gib: Positive | None = None  # of one GPU
    labels: dict[str, str] = Field(default_factory=dict)
    tflops: Positive | None = None  # sustained by one worker
    tokens_per_second: Positive | None = None  # of one worker that trains a branch
    preemptions_per_hour: NotNegative = 0.0  # of each node
    replacement_seconds: NotNegative = 300.0  # until a node that was taken away is there again

    @model_validator(mode="after")
    def _one_speed(self) -> Self:
        if (self.tflops is None) == (self.tokens_per_second is None):
            raise ValueError("give exactly one of `tflops` and `tokens_per_second`")
        return self

    @property
    def resources(self) -> dict[str, float]:
        """In Ray's words."""
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_gib * GIB}

    @property
    def all_labels(self) -> dict[str, str]:
        """With the accelerator's."""
        return {ACCELERATOR: self.accelerator, **self.labels} if self.accelerator else self.labels


class ClusterFile(Strict):
    """A whole cluster, and what starting and stopping costs on it."""

    name: Name
    nodes: dict[Name, NodeGroup]
    start_seconds: NotNegative = 60.0  # from being placed to the first step: process, data, weights
    checkpoint_seconds: NotNegative = 20.0  # from the last step to a checkpoint or a model in the blob store
    stage_seconds: dict[ArtifactKind, NotNegative] = Field(default_factory=lambda: dict(STAGE_SECONDS))


def load_cluster(path: str | Path) -> ClusterFile:
    """Read the cluster at `path`; raises `SettingsError`."""
    return load_as(ClusterFile, path, "cluster file")
