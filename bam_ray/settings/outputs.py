"""Settings of the outputs of a run: evaluation, the endpoint, and the curves of training."""

import ipaddress
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

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
    engine: Literal["bam", "vllm"] = "bam"
    """The engine that computes responses: this project's own, or vLLM in an environment of its own (see
    [vLLM](serving.md#vllm))."""
    vllm_python: str | None = None
    """Path of a Python interpreter with vLLM on the nodes. It is needed with `engine: vllm`."""
    host: str = "127.0.0.1"
    """Address to listen on. Addresses that other machines can reach need `api_keys`, or `open: true`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    replicas: Count = 1
    """Number of replicas."""
    slots: Count = 8
    """Number of requests that a replica decodes at the same time."""
    max_length: Count = 512
    """Maximum length of prompt and completion together, in tokens."""
    kv_tokens: Count | None = None
    """Number of tokens whose keys and values a replica has memory for. A request reserves its prompt and its longest
    completion. `null` means `slots` requests of `max_length`. With fewer, more short requests than long ones are
    decoded together."""
    tokens_per_step: Count | None = None
    """Number of tokens that a step computes: one for each request that decodes, and the rest for prompts. More tokens
    begin responses sooner, and delay those that are being decoded. `null` means a default for the device."""
    dtype: Literal["fp32", "bf16", "auto"] = "auto"
    """Precision of weights and computation. `auto` means bf16 on GPUs that support it, and fp32 elsewhere. With fp32,
    matrix products on GPUs use TF32."""
    needs: Demand = Demand()
    """Resources of each replica."""
    api_keys: str | None = None
    """List of the API keys that clients may use, as hashes: `env:NAME` for an environment variable, or the path of a
    file. It is read where the endpoint is deployed from, which is the head node for `bam serve`. `null` means that
    clients need no key (see [API keys](serving.md#api-keys))."""
    open: bool = False
    """Serve everybody who can connect, without a key, also on addresses that other machines can reach."""
    max_body_bytes: Count = 4 << 20
    """Maximum size of the body of a request, in bytes. Larger ones are refused with status 413."""
    max_prompts: Count = 64
    """Maximum number of prompts in a request."""
    max_queued_prompts: Count = 1024
    """Maximum number of prompts that wait for a slot in a replica. More are refused with status 429."""
    max_queued_tokens: Count = 1 << 20
    """Maximum number of tokens of all prompts that wait for a slot in a replica. More are refused with status 429."""

    @property
    def is_local(self) -> bool:
        """True if only clients on the same machine can connect."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # another name
            return False

    @model_validator(mode="after")
    def _is_protected(self) -> Self:
        if not self.is_local and not self.open and self.api_keys is None:
            raise ValueError(
                f"serve.host is {self.host}, which other machines can reach: set serve.api_keys (`bam serve-key` makes "
                "a key), or serve.open to true if everybody who can connect may send requests"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_engine(self) -> Self:
        if self.engine == "bam":
            return self
        for wrong, message in (
            (self.vllm_python is None, "serve.engine vllm needs serve.vllm_python: name a Python that has vLLM"),
            (self.mode != "mixture", "serve.mode posterior needs serve.engine bam: vLLM serves one model"),
        ):
            if wrong:
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _queue_holds_a_request(self) -> Self:
        for queue, one in (("max_queued_prompts", "max_prompts"), ("max_queued_tokens", "max_length")):
            if getattr(self, queue) < getattr(self, one):
                raise ValueError(
                    f"serve.{queue} is {getattr(self, queue)}, less than serve.{one}, which is {getattr(self, one)}: "
                    "raise it, because a request has to fit into the queue"
                )
        return self


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
