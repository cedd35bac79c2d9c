"""The OpenAI-compatible endpoint on Ray Serve: replicas of `serving.create_app` behind one HTTP proxy.

    models, name = served_models(run)
    url = deploy(models, name, recipe.serve)       # http://127.0.0.1:8000/v1
    shutdown()

Both need a driver that is connected to the cluster (`ray.init`). The endpoint outlives that driver. Deploying again
replaces the model replica by replica. If the cluster has capacity for one more replica, an old one stops only after its
successor answers: requests keep being served, and a model that does not start causes no outage. The host and port of a
running Ray Serve cannot be changed.

The proxy runs on the head node alone, because nodes may share one machine and therefore one port.

The driver reads the list of API keys, and passes the hashes to the replicas. A replica whose engine is dead fails its
health check, and Serve replaces it.

Clusters that are configured by Serve configuration files (cluster/kuberay/rayservice.yaml) import `application`.
"""

import logging
import os
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bam_ray.blobs import open_store
from bam_ray.blobs.patience import retry_on
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import CheckpointError, PlacementError, ServingError, SettingsError, StoreUnavailable
from bam_ray.on_ray.cluster import living_nodes
from bam_ray.on_ray.worker_env import device_environment
from bam_ray.pipeline.run import PipelineRun
from bam_ray.scheduling.nodes import HEAD, NodeFacts, describe_nodes, describe_request, ray_resources, worker_capacity
from bam_ray.settings import Recipe, ServeSettings, load_recipe
from bam_ray.settings.api_keys import ApiKey, read_api_keys
from bam_ray.terminal import warn

APP = "bam"
POSTERIOR = "posterior"  # the name of the posterior ensemble, at the endpoint as in the report
ANY_HOST = {"0.0.0.0", "::"}
LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}  # of this machine, in the Host header
ONGOING_PER_REPLICA = 1024
"""Requests that a replica holds. Those beyond its slots wait inside it, so that /health and /metrics still answer."""
QUEUED_PER_PROXY = 1024  # requests that wait in the proxy for a replica; it refuses more with status 503
DRAIN_SECONDS = 60.0  # time that a replica has to finish its requests when it is replaced or stopped


@serve.ingress()
class Endpoint:
    """One replica: weights from the blob store, a decoding engine, and the HTTP app."""

    def __init__(
        self, artifacts: Sequence[Artifact], model_name: str, settings: ServeSettings, access: "EndpointAccess"
    ) -> None:
        os.environ.update(device_environment(settings.needs.gpus))
        # Imported here, because the driver that deploys needs no model code
        import torch
        from transformers import AutoTokenizer

        from bam_ray.model.loading import load_folder
        from bam_ray.serving import AppOptions, DecodeEngine, PosteriorEnsemble, Scheduler, create_app
        from bam_ray.serving.vllm_app import create_vllm_app
        from bam_ray.serving.vllm_server import VllmServer, start_vllm
        from bam_ray.training.devices import inference_dtype, requested_device

        torch.set_num_threads(max(1, int(settings.needs.cpus)))
        folders = [artifact.fetch() for artifact in artifacts]
        options = AppOptions(
            api_keys=access.keys,
            allowed_hosts=access.hosts,
            max_body_bytes=settings.max_body_bytes,
            max_prompts=settings.max_prompts,
            max_prompt_tokens=settings.max_queued_tokens,
            add_request_id=False,
        )
        if settings.engine == "vllm":
            self._backend: Scheduler | VllmServer = start_vllm(folders[0], model_name, settings)
            self._app = create_vllm_app(
                self._backend, model_name, settings.max_length, settings.slots + settings.max_queued_prompts, options
            )
            return
        try:
            tokenizer = AutoTokenizer.from_pretrained(folders[0])
        except Exception:  # of any type: the tokenizers library raises `Exception` for a file of a new version
            raise ServingError(
                f"{artifacts[0].kind}/{artifacts[0].id} has no tokenizer that can be loaded: text cannot be served"
            ) from None
        device = requested_device(settings.needs.gpus)
        dtype = inference_dtype(device, settings.dtype)
        models = [load_folder(folder, dtype).to(device) for folder in folders]
        model = models[0] if len(models) == 1 else PosteriorEnsemble(models)
        engine = DecodeEngine(
            model,
            tokenizer,
            settings.slots,
            settings.max_length,
            kv_tokens=settings.kv_tokens,
            tokens_per_step=settings.tokens_per_step,
        )
        self._backend = Scheduler(
            engine, max_queued_prompts=settings.max_queued_prompts, max_queued_tokens=settings.max_queued_tokens
        )
        self._app = create_app(self._backend, model_name, options)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the HTTP app. Ray Serve calls this after the constructor."""
        return self._app

    def check_health(self) -> None:
        """Raise `ServingError` if the engine is dead. Ray Serve calls this, and then replaces the replica."""
        if self._backend.failure is not None:
            raise self._backend.failure


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


class ApplicationArguments(BaseModel):
    """The arguments that a Serve configuration file passes to `application`."""

    model_config = ConfigDict(extra="forbid")

    recipe: str  # a path on the nodes
    overrides: list[str] = []  # the `key=value` overrides that the run was made with


def application(arguments: ApplicationArguments) -> Application:
    """Return what the recipe serves as a Serve application, with the replicas and resources of `serve` in the recipe.

    The configuration file sets the address, and `serve.host` has no effect.

    Raises `SettingsError` if the recipe is wrong, and `CheckpointError` if the models are not committed.
    """
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.serve.api_keys is None and not recipe.serve.open:
        raise SettingsError(
            "an endpoint of a Serve configuration file needs API keys, because the file decides who can connect: add "
            "the override serve.api_keys (`bam serve-key` makes a key), or serve.open=true for everybody"
        )
    run = PipelineRun.of(recipe, open_store(recipe.store.uri, recipe.store.endpoint))
    models, name = served_models(run)
    return _application(models, name, recipe.serve, EndpointAccess.of(recipe.serve, is_local=False), surge=False)


def served_kinds(recipe: Recipe) -> Collection[ArtifactKind]:
    """Return the kinds of artifacts that must be made before the recipe can be served."""
    return [ArtifactKind.BRANCHES if recipe.serve.mode == "posterior" else ArtifactKind.MIXTURES]


def served_models(run: PipelineRun) -> tuple[list[Artifact], str]:
    """Return the artifacts that the recipe serves, and the name of the model that they are together.

    They are one mixture, or with `serve.mode` posterior the seed and all branches that are committed and have all
    their files.

    Raises:
        CheckpointError: The ensemble would have no branch.
    """
    recipe = run.recipe
    if recipe.serve.mode == "mixture":
        name = recipe.serve.mixture or next(iter(recipe.upcycle.mixtures))
        return [run.artifact(ArtifactKind.MIXTURES, name)], name
    branches = [run.artifact(ArtifactKind.BRANCHES, domain) for domain in recipe.branch.domains]
    patiently = retry_on(StoreUnavailable, warn)
    whole = [branch for branch in branches if patiently(branch.has_all_files)]
    if not whole:
        raise CheckpointError(f"no branch of {run.store.uri} is committed: run the stage that makes them, then serve")
    return [run.artifact(ArtifactKind.SEEDS, "seed"), *whole], POSTERIOR


def deploy(artifacts: Sequence[Artifact], model_name: str, settings: ServeSettings) -> str:
    """Serve a model, and return the base URL for OpenAI clients when all replicas answer.

    Args:
        artifacts: The model, or the members of a posterior ensemble with the seed first.
        model_name: The name of the model in requests.
        settings: The settings of the endpoint.

    Raises:
        SettingsError: The list of API keys is missing or wrong.
        CheckpointError: An artifact is not committed.
        PlacementError: The nodes can never hold the replicas.
        ServingError: The port is taken, or a replica does not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    access = EndpointAccess.of(settings, settings.is_local)
    nodes = living_nodes()
    surge = _has_spare_capacity(settings, nodes)
    app = _application(artifacts, model_name, settings, access, surge)
    head = next(node for node in nodes if HEAD in node.resources)
    _start_serve(settings, head)
    try:
        serve.run(app, name=APP, route_prefix="/")
    except RuntimeError as error:
        raise ServingError(f"{model_name} could not be served: {_replica_error() or error}") from None
    host = head.address if settings.host in ANY_HOST else settings.host
    return f"http://{host}:{settings.port}/v1"


def _application(
    artifacts: Sequence[Artifact], model_name: str, settings: ServeSettings, access: EndpointAccess, surge: bool
) -> Application:
    """Return the endpoint as Serve runs it. With `surge`, one more replica may run while replicas are replaced."""
    for artifact in artifacts:
        if not retry_on(StoreUnavailable, warn)(artifact.is_committed):
            raise CheckpointError(f"{artifact.uri} is not committed: run the stage that makes it, then serve")
    resources = ray_resources(settings.needs)
    deployment = serve.deployment(Endpoint, name="endpoint").options(
        num_replicas=settings.replicas,
        max_surge_percent=1 if surge else 0,  # Serve rounds up to a whole replica
        max_ongoing_requests=ONGOING_PER_REPLICA,
        max_queued_requests=QUEUED_PER_PROXY,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        ray_actor_options={
            "num_cpus": resources.get("CPU", 0.0),
            "num_gpus": resources.get("GPU", 0.0),
            "memory": resources.get("memory", 0.0),
            "label_selector": settings.needs.labels,
        },
    )
    return deployment.bind(artifacts, model_name, settings, access)


def shutdown() -> None:
    """Stop the endpoint and Ray Serve; does nothing if they are not running."""
    serve.shutdown()


def _has_spare_capacity(settings: ServeSettings, nodes: list[NodeFacts]) -> bool:
    """Return True if one more replica fits on the nodes; raises `PlacementError` if the replicas themselves do not."""
    fitting = worker_capacity(settings.needs, nodes, settings.replicas + 1)
    if fitting < settings.replicas:
        raise PlacementError(
            f"{settings.replicas} replica(s) of {describe_request(settings.needs)} can never fit on the {len(nodes)} "
            f"living nodes ({describe_nodes(nodes)}): change serve.needs or serve.replicas, or add nodes"
        )
    return fitting > settings.replicas


def _start_serve(settings: ServeSettings, head: NodeFacts) -> None:
    """Start Ray Serve at the host and port of `settings`, unless it is running there already."""
    try:
        running = _get_global_client().http_config
    except RayServeException:
        running = None
    if running is not None:
        if (running.host, running.port) != (settings.host, settings.port):
            raise ServingError(
                f"Ray Serve already listens on {running.host}:{running.port} in this cluster: set serve.host and "
                "serve.port to that address, or shut it down first"
            )
        return
    on_head = NodeAffinitySchedulingStrategy(head.id, soft=False)
    ask_head = ray.remote(num_cpus=0, scheduling_strategy=on_head)(_listen_error)
    reason = ray.get(ask_head.remote(settings.host, settings.port))
    if reason:
        raise ServingError(
            f"{settings.host}:{settings.port} on the head node cannot be used ({reason}): choose another "
            "serve.port or serve.host"
        )
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=settings.host, port=settings.port)
        )
    except (RayError, RuntimeError, TimeoutError) as error:
        raise ServingError(f"Ray Serve does not start: {str(error).splitlines()[0]}") from None


def _listen_error(host: str, port: int) -> str:
    """Return why this node cannot listen at the address; empty if it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # Servers set this too: connections of a server that has just stopped do not block the port
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _replica_error() -> str:
    """Return the last error line among the messages of failed replicas; empty if there is none."""
    application = serve.status().applications.get(APP)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    lines = [line for message in messages for line in message.splitlines() if line.strip()]
    return next((line.strip() for line in reversed(lines) if "Error" in line), "")
