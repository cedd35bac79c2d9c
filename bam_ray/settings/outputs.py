"""Settings of the outputs of a run: evaluation, the endpoint, and the curves of training."""

import ipaddress
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from bam_ray.settings.resources import Demand, Needs
from bam_ray.settings.serve_adapters import ServeAdapterSettings
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
    lm_eval_tasks: Annotated[str | None, Identity.EXCLUDED] = None
    """Folder with tasks of [lm-eval](https://github.com/EleutherAI/lm-evaluation-harness) (YAML files), on which every
    model is scored too. It must have the same path on all nodes that can evaluate, and the paths of data in it must be
    absolute. It requires `pip install 'bam-ray[lm-eval]'`. (The identity of a report contains the path, and that of
    the scores the content of the folder.)"""
    needs: Annotated[Needs, Identity.EXCLUDED] = Needs()
    """Resources of the process that evaluates."""


class ReplicaRange(Strict):
    """Replicas that are added and removed with the load.

    The load is the share of slots, or of memory for keys and values, that running and waiting requests need. It is
    kept below 80 %.
    """

    min: Count = 1
    """Smallest number of replicas."""
    max: Count
    """Largest number of replicas."""
    up_seconds: Positive = 10.0
    """Time for which the load must need more replicas before they are added."""
    down_seconds: Positive = 300.0
    """Time for which the load must need fewer replicas before the others are removed. They finish their requests."""

    @model_validator(mode="after")
    def _is_range(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, which is more than max ({self.max}): exchange them")
        return self


Replicas = Annotated[
    Annotated[Count, Tag("number")] | Annotated[ReplicaRange, Tag("range")],
    # The discriminator makes pydantic report the errors of the form that was meant, not of both
    Discriminator(lambda value: "range" if isinstance(value, dict | ReplicaRange) else "number"),
]


class ServeSettings(Strict):
    """The OpenAI-compatible endpoint."""

    mode: Literal["mixture", "posterior", "adapters"] = "mixture"
    """The model to serve. `mixture` means a mixture. `posterior` means the posterior ensemble of the seed and all
    committed branches (see [Serve the branches without mixing](recipes.md#serve-the-branches-without-mixing)). It
    needs no upcycling and no mixing, and is served under the name `posterior`. `adapters` means the seed with
    `adapters`, under the name `seed` (see [Serve the adapters](moin.md#serve-the-adapters))."""
    mixture: Name | None = None
    """Name of the mixture to serve. `null` means the first of `upcycle.mixtures`. It must be `null` with `mode`
    `posterior` and `adapters`."""
    adapters: ServeAdapterSettings | None = None
    """The adapters of `mode` `adapters`, which needs them."""
    follow: bool = False
    """Serve newer models as soon as the run commits them: another mixture of the same name, or with `mode` `posterior`
    more branches. They are tested first, and roll out replica by replica (see
    [New models](serving.md#new-models)). It needs room for one more replica."""
    engine: Literal["bam", "vllm"] = "bam"
    """The engine that computes responses: this project's own, or vLLM in an environment of its own (see
    [vLLM](serving.md#vllm))."""
    vllm_python: str | None = None
    """Path of a Python interpreter with vLLM on the nodes. It is needed with `engine: vllm`."""
    host: str = "127.0.0.1"
    """Address to listen on. Addresses that other machines can reach need `api_keys`, or `open: true`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    replicas: Replicas = 1
    """Number of replicas, or a range `{min, max, up_seconds, down_seconds}` in which it follows the load."""
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
    prefix_cache: bool = True
    """Keep the keys and values of requests that have ended until their memory is needed. Requests whose prompts begin
    alike use them, and begin sooner."""
    dtype: Literal["fp32", "bf16", "auto"] = "auto"
    """Precision of weights and computation. `auto` means bf16 on GPUs that support it, and fp32 elsewhere. With fp32,
    matrix products on GPUs use TF32."""
    pack_weights: bool = True
    """On CPUs, keep the weights in the layout of oneDNN, which decodes several requests faster. Sums are computed in
    another order, so log-probabilities change by rounding errors. GPUs ignore it."""
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
    def least_replicas(self) -> int:
        """The number of replicas without load."""
        return self.replicas.min if isinstance(self.replicas, ReplicaRange) else self.replicas

    @property
    def most_replicas(self) -> int:
        """The largest number of replicas."""
        return self.replicas.max if isinstance(self.replicas, ReplicaRange) else self.replicas

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
    def _adapters_are_served(self) -> Self:
        if (self.mode == "adapters") != (self.adapters is not None):
            raise ValueError("serve.mode adapters and serve.adapters need each other: set both, or omit both")
        if self.mode == "adapters" and self.mixture is not None:
            raise ValueError("serve.mode adapters serves the seed: set serve.mixture to null")
        if self.mode == "adapters" and self.follow:
            raise ValueError("serve.mode adapters serves the seed, which never changes: set serve.follow to false")
        return self

    @model_validator(mode="after")
    def _fits_the_engine(self) -> Self:
        if self.engine == "bam":
            return self
        for wrong, message in (
            (self.vllm_python is None, "serve.engine vllm needs serve.vllm_python: name a Python that has vLLM"),
            (self.mode != "mixture", f"serve.mode {self.mode} needs serve.engine bam: vLLM serves one model"),
            (self.follow, "serve.follow needs serve.engine bam, which tests new models: set it to false"),
            (isinstance(self.replicas, ReplicaRange), "serve.engine vllm needs a number of replicas, and no range"),
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
