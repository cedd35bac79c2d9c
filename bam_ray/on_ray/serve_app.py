"""The OpenAI-compatible endpoint on Ray Serve: replicas of `serving.create_app` behind one HTTP proxy.

    url = deploy("s3://bam/demo", None, "mixtures", id, "demo", recipe.serve)    # http://127.0.0.1:8000/v1
    shutdown()

Both need a driver that is connected to the cluster (`ray.init`). The app outlives that driver. Deploying again
replaces the model replica by replica; where the cluster has room for one more, an old replica goes only when its
successor answers, so that requests go on and a model that does not start costs nothing. Host and port of a running
Serve stay as they are.

The proxy runs on the head node alone: nodes may share one machine, and then its port too.

Clusters that Serve's own configuration files describe (cluster/kuberay/rayservice.yaml) import `application` instead.
"""

import logging
import socket
from typing import Any

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
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import CheckpointError, PlacementError, ServingError
from bam_ray.on_ray.cluster import living_nodes
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.scheduling.nodes import NodeFacts, resources_of, room, said_of, said_of_nodes
from bam_ray.settings import Recipe, ServeSettings, load_recipe

APP = "bam"
HEAD = "node:__internal_head__"  # a resource that Ray gives the head node alone
ANY_HOST = {"0.0.0.0", "::"}
ONGOING_PER_REPLICA = 1024
"""Requests that a replica holds; those beyond its slots wait in it, so that /health and /metrics still get through."""
DRAIN_SECONDS = 60.0  # that a replica which is replaced or stopped has for the requests it holds


@serve.ingress()
class Endpoint:
    """One replica: weights from the blob store, an engine, the app."""

    def __init__(
        self, store_uri: str, endpoint: str | None, kind: ArtifactKind, id: str, model_name: str, plain: Any
    ) -> None:
        # Here, not above: the driver that deploys needs no model code
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import bam_ray.model  # noqa: F401  (makes the mixture known to AutoModelForCausalLM)
        from bam_ray.serving import DecodeEngine, Scheduler, create_app

        settings = ServeSettings.model_validate(plain)
        torch.set_num_threads(max(1, int(settings.needs.cpus)))
        folder = Artifact(open_store(store_uri, endpoint), kind, id).fetch()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError):
            raise ServingError(f"{kind}/{id} has no tokenizer that loads: text cannot be served") from None
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        model.to("cuda" if settings.needs.gpus else "cpu")
        engine = DecodeEngine(model, tokenizer, settings.slots, settings.max_length)
        self._app = create_app(Scheduler(engine), model_name)

    def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve asks for the app after the constructor."""
        return self._app


class Served(BaseModel):
    """What a Serve configuration file gives to `application`."""

    model_config = ConfigDict(extra="forbid")

    recipe: str  # a path on the nodes
    overrides: list[str] = []  # those that the run was made with, as `key=value`


def application(arguments: Served) -> Application:
    """The recipe's mixture as a Serve application; replicas and needs are those of `serve` in the recipe.

    Raises `SettingsError` where the recipe is wrong, `CheckpointError` where the mixture is not committed.
    """
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    artifact, name = mixture_of(recipe)
    return _bound(artifact, recipe.store.endpoint, name, recipe.serve, spare=False)


def mixture_of(recipe: Recipe) -> tuple[Artifact, str]:
    """The mixture that a recipe serves, and its name."""
    name = recipe.serve.mixture or next(iter(recipe.upcycle.mixtures))
    id = find_task(task_graph(recipe), ArtifactKind.MIXTURES, name).id
    return Artifact(open_store(recipe.store.uri, recipe.store.endpoint), ArtifactKind.MIXTURES, id), name


def deploy(
    store_uri: str, endpoint: str | None, kind: ArtifactKind, id: str, model_name: str, settings: ServeSettings
) -> str:
    """Serve an artifact; returns the base URL for OpenAI clients when all replicas answer.

    Raises `CheckpointError` where the artifact is not committed, `PlacementError` where no node can ever hold a
    replica, `ServingError` where the port is taken or a replica does not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    artifact = Artifact(open_store(store_uri, endpoint), kind, id)
    nodes = living_nodes()
    spare = _spare_room(settings, nodes)
    app = _bound(artifact, endpoint, model_name, settings, spare)
    head = next(node for node in nodes if HEAD in node.resources)
    _start_serve(settings, head)
    try:
        serve.run(app, name=APP, route_prefix="/")
    except RuntimeError as error:
        raise ServingError(f"{model_name} could not be served: {_reason() or error}") from None
    host = head.address if settings.host in ANY_HOST else settings.host
    return f"http://{host}:{settings.port}/v1"


def _bound(
    artifact: Artifact, endpoint: str | None, model_name: str, settings: ServeSettings, spare: bool
) -> Application:
    """The endpoint as Serve runs it; `spare`: the cluster has room for one replica more while they are replaced."""
    if artifact.manifest() is None:
        raise CheckpointError(f"{artifact.uri} is not committed: run the stage that makes it, then serve")
    wanted = resources_of(settings.needs)
    deployment = serve.deployment(Endpoint, name="endpoint").options(
        num_replicas=settings.replicas,
        max_surge_percent=1 if spare else 0,  # rounded up to a whole replica
        max_ongoing_requests=ONGOING_PER_REPLICA,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        ray_actor_options={
            "num_cpus": wanted.get("CPU", 0.0),
            "num_gpus": wanted.get("GPU", 0.0),
            "memory": wanted.get("memory", 0.0),
            "label_selector": settings.needs.labels,
        },
    )
    plain = settings.model_dump()
    return deployment.bind(artifact.store.uri, endpoint, artifact.kind, artifact.id, model_name, plain)


def shutdown() -> None:
    """Stop the endpoint and Ray Serve; nothing happens where it does not run."""
    serve.shutdown()


def _spare_room(settings: ServeSettings, nodes: list[NodeFacts]) -> bool:
    """Whether one replica more would fit on idle nodes; raises `PlacementError` where not even the replicas do."""
    fitting = room(settings.needs, nodes, settings.replicas + 1)
    if fitting < settings.replicas:
        raise PlacementError(
            f"{settings.replicas} replica(s) of {said_of(settings.needs)} can never fit on the {len(nodes)} living "
            f"nodes ({said_of_nodes(nodes)}): mend serve.needs or serve.replicas, or add nodes"
        )
    return fitting > settings.replicas


def _start_serve(settings: ServeSettings, head: NodeFacts) -> None:
    """Start Ray Serve at the host and port, unless it runs there already."""
    try:
        running = _get_global_client().http_config
    except RayServeException:
        running = None
    if running is not None:
        if (running.host, running.port) != (settings.host, settings.port):
            raise ServingError(
                f"Ray Serve of this cluster listens on {running.host}:{running.port} already: serve there "
                f"(serve.host, serve.port), or shut it down first"
            )
        return
    on_head = NodeAffinitySchedulingStrategy(head.id, soft=False)
    ask_head = ray.remote(num_cpus=0, scheduling_strategy=on_head)(_why_not)
    taken = ray.get(ask_head.remote(settings.host, settings.port))
    if taken:
        raise ServingError(
            f"{settings.host}:{settings.port} on the head node cannot be listened on ({taken}): choose another "
            "serve.port or serve.host"
        )
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=settings.host, port=settings.port)
        )
    except (RayError, RuntimeError, TimeoutError) as error:
        raise ServingError(f"Ray Serve does not start: {str(error).splitlines()[0]}") from None


def _why_not(host: str, port: int) -> str:
    """Why this node cannot listen there; empty where it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do: connections of a server that just ended don't count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _reason() -> str:
    """The last line of what a failed replica said."""
    application = serve.status().applications.get(APP)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    lines = [line for message in messages for line in message.splitlines() if line.strip()]
    return next((line.strip() for line in reversed(lines) if "Error" in line), "")
