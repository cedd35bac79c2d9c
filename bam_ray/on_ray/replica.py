"""A replica of the endpoint: weights from the blob store, a decoding engine, and the HTTP app."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ray import serve

from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.errors import ServingError
from bam_ray.on_ray.replica_metrics import ReplicaGauges
from bam_ray.on_ray.scaling import LOAD
from bam_ray.on_ray.worker_env import device_environment
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import ServeSettings
from bam_ray.settings.api_keys import ApiKey, read_api_keys

if TYPE_CHECKING:
    from bam_ray.serving import DecodeEngine
    from bam_ray.serving.served_adapters import ServedAdapters

LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}  # of this machine, in the Host header


@dataclass(frozen=True)
class EndpointAccess:
    """The clients that an endpoint serves."""

    keys: Sequence[ApiKey]  # empty: everybody who can connect
    hosts: Collection[str] | None  # names of the server in the Host header; None: any

    @classmethod
    def of(cls, settings: ServeSettings, is_local: bool) -> Self:
        """Return the access that the settings give. `is_local`: only clients on the machine of the proxy can connect.

        Web pages may send requests from a browser on this machine (DNS rebinding). An API key keeps them out, and
        without one the name of the server does.
        """
        if settings.api_keys is not None:
            return cls(read_api_keys(settings.api_keys), None)
        return cls((), None if settings.open or not is_local else LOCAL_NAMES | {settings.host})


@serve.ingress()
class Endpoint:
    """One replica of the endpoint on Ray Serve."""

    _adapters: "ServedAdapters | None" = None

    def __init__(
        self,
        artifacts: Sequence[Artifact],
        model_name: str,
        settings: ServeSettings,
        access: EndpointAccess,
        run: PipelineRun | None = None,  # whose adapters are served
    ) -> None:
        # Imported here, because the driver that deploys needs no model code
        from bam_ray.serving import AppOptions, Scheduler, create_app
        from bam_ray.serving.adapter_setup import open_adapters
        from bam_ray.serving.vllm_app import create_vllm_app
        from bam_ray.serving.vllm_server import VllmServer, start_vllm

        options = AppOptions(
            api_keys=access.keys,
            allowed_hosts=access.hosts,
            max_body_bytes=settings.max_body_bytes,
            max_prompts=settings.max_prompts,
            max_prompt_tokens=settings.max_queued_tokens,
            add_request_id=False,
            artifacts=[artifact.prefix for artifact in artifacts],
        )
        if settings.engine == "vllm":
            os.environ.update(device_environment(settings.needs.gpus))
            self._backend: Scheduler | VllmServer = start_vllm(artifacts[0].fetch(), model_name, settings)
            most_requests = settings.slots + settings.max_queued_prompts
            self._app = create_vllm_app(self._backend, model_name, settings.max_length, most_requests, options)
            return
        engine = load_engine(artifacts, settings)
        self._backend = Scheduler(
            engine, max_queued_prompts=settings.max_queued_prompts, max_queued_tokens=settings.max_queued_tokens
        )
        if engine.lora is not None and settings.adapters is not None:
            self._adapters = open_adapters(model_name, artifacts[0].fetch(), engine.lora, settings.adapters, run)
        self._app = create_app(self._backend, model_name, options, self._adapters)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the HTTP app. Ray Serve calls this after the constructor."""
        self._gauges = ReplicaGauges(self._app.state.metrics.samples)
        return self._app

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the metric by which `scaling.replicas_for_load` chooses the number of replicas, if it is known."""
        from bam_ray.serving import Scheduler

        if not isinstance(self._backend, Scheduler):
            return {}
        # Requests that wait for an adapter are not in the queue of the scheduler yet
        waiting = 0 if self._adapters is None else self._adapters.pool.waiting
        return {LOAD: self._backend.load + waiting / self._backend.engine.slots}

    def check_health(self) -> None:
        """Raise `ServingError` if the engine is dead. Ray Serve calls this, and then replaces the replica."""
        if self._backend.failure is not None:
            raise self._backend.failure


def load_engine(artifacts: Sequence[Artifact], settings: ServeSettings) -> "DecodeEngine":
    """Return an engine with the model of `artifacts`: one model, or the members of a posterior ensemble.

    The engine has adapter slots if the settings have adapters.

    Raises:
        CheckpointError: An artifact is not committed, or its files are damaged.
        ServingError: The model cannot be served.
    """
    os.environ.update(device_environment(settings.needs.gpus))
    import torch
    from transformers import AutoTokenizer

    from bam_ray.model.loading import load_folder
    from bam_ray.serving import DecodeEngine, PosteriorEnsemble
    from bam_ray.serving.lora import LoraSlots
    from bam_ray.serving.packed import can_pack, pack_weights
    from bam_ray.training.devices import inference_dtype, requested_device

    torch.set_num_threads(max(1, int(settings.needs.cpus)))
    folders = [artifact.fetch() for artifact in artifacts]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folders[0])
    except Exception:  # of any type: the tokenizers library raises `Exception` for a file of a new version
        raise ServingError(
            f"{artifacts[0].prefix} has no tokenizer that can be loaded: text cannot be served"
        ) from None
    device = requested_device(settings.needs.gpus)
    dtype = inference_dtype(device, settings.dtype)
    models = [load_folder(folder, dtype).to(device) for folder in folders]
    chosen = settings.adapters
    lora = None if chosen is None else LoraSlots(models[0], chosen.slots, chosen.max_rank)
    if settings.pack_weights and can_pack(device, dtype):
        for model in models:
            pack_weights(model)
    engine = DecodeEngine(
        models[0] if len(models) == 1 else PosteriorEnsemble(models),
        tokenizer,
        settings.slots,
        settings.max_length,
        kv_tokens=settings.kv_tokens,
        tokens_per_step=settings.tokens_per_step,
        prefix_cache=settings.prefix_cache,
    )
    engine.lora = lora
    return engine


def try_models(artifacts: Sequence[Artifact], settings: ServeSettings) -> None:
    """Load the model as a replica does, and continue a few texts with it.

    Raises `CheckpointError` or `ServingError` if a replica could not serve it.
    """
    engine = load_engine(artifacts, settings)
    from bam_ray.serving.smoke import continue_texts

    continue_texts(engine)
