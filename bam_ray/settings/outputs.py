"""Settings of the outputs of a run: evaluation, the endpoint, and the curves of training."""

from typing import Annotated, Literal

from pydantic import Field

from bam_ray.settings.resources import Demand, Needs
from bam_ray.settings.strict import Count, Identity, Name, Positive, Strict


class EvaluateSettings(Strict):
    """Held-out perplexity and routing of every model on every domain."""

    tokens_per_domain: Count = 32768
    """Number of held-out tokens per domain."""
    dtype: Literal["fp32", "bf16", "auto"] = "auto"
    """Precision of weights and computation. `auto` means bf16 on GPUs that support it, and fp32 elsewhere. With fp32,
    matrix products on GPUs use TF32."""
    batch_sequences: Annotated[Count, Identity.EXCLUDED] = 4
    """Number of sequences per forward pass. It is halved each time memory runs out."""
    needs: Annotated[Needs, Identity.EXCLUDED] = Needs()
    """Resources of the process that evaluates."""


class ServeSettings(Strict):
    """The OpenAI-compatible endpoint."""

    mode: Literal["mixture", "posterior"] = "mixture"
    """The model to serve. `mixture` means a mixture. `posterior` means the posterior ensemble of the seed and all
    committed branches (see [Serve the branches without mixing](recipes.md#serve-the-branches-without-mixing)). It
    needs no upcycling and no mixing, and is served under the name `posterior`."""
    mixture: Name | None = None
    """Name of the mixture to serve. `null` means the first of `upcycle.mixtures`. It must be `null` with `mode`
    `posterior`."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    replicas: Count = 1
    """Number of replicas."""
    slots: Count = 8
    """Number of requests that a replica decodes at the same time."""
    max_length: Count = 512
    """Maximum length of prompt and completion together, in tokens."""
    dtype: Literal["fp32", "bf16", "auto"] = "auto"
    """Precision of weights and computation. `auto` means bf16 on GPUs that support it, and fp32 elsewhere. With fp32,
    matrix products on GPUs use TF32."""
    needs: Demand = Demand()
    """Resources of each replica."""


class RoutingSettings(Strict):
    """Monitoring of the routers during training.

    The two limits are multiples of an equal share of the load. Their defaults are our own choice.
    """

    every: Count = 10
    """Number of steps over which the load is averaged and reported."""
    dead_below: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """An expert with less load is reported as dead."""
    overloaded_above: Annotated[float, Field(gt=1.0)] = 3.0
    """An expert with more load is reported as overloaded."""


class MetricsSettings(Strict):
    """The outputs of training curves, in addition to the run's table and Ray's Prometheus endpoint."""

    tensorboard: bool = True
    """Write TensorBoard files under `<kind>/<id>/tensorboard/` in the blob store."""
    wandb_project: str | None = None
    """Weights & Biases project. It requires the package `wandb` and its API key in the environment."""
    routing: RoutingSettings = RoutingSettings()
    """Monitoring of the routers."""
    peak_tflops: Positive | None = None
    """Peak bf16 throughput of one device in TFLOP/s, for the model FLOPs utilization. `null` means to look it up by
    the name of the device."""
