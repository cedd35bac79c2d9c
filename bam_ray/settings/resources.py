"""Resources that a worker requests from its node."""

from pydantic import Field

from bam_ray.settings.labels import LabelSelector
from bam_ray.settings.strict import NotNegative, Strict


class Demand(Strict):
    """The resources of one worker."""

    cpus: NotNegative = 1.0
    """Number of CPUs. The worker computes with as many threads."""
    gpus: NotNegative = 0.0
    """Number of GPUs. 0 means that the worker computes on the CPU."""
    memory_gib: NotNegative = 0.0
    """Host memory in GiB. 0 means that nothing is reserved: the worker takes its share of the free memory."""
    labels: LabelSelector = Field(default={})
    """Ray's label selector for the node, for example `{"ray.io/accelerator-type": "in(A100,H100)"}`."""


class Needs(Demand):
    """The resources of one worker, with alternatives."""

    fallback: tuple[Demand, ...] = ()
    """Alternatives, in order. Each is used only if no node of the cluster can ever satisfy those before it."""
