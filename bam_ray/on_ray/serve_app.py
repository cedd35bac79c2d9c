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
import socket
from collections.abc import Collection, Sequence
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingPolicy,
    BackpressureConfig,
    ControllerOptions,
    HTTPOptions,
    ProxyLocation,
)
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bam_ray.blobs import open_store
from bam_ray.blobs.patience import retry_on
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import CheckpointError, PlacementError, ServingError, SettingsError, StoreUnavailable
from bam_ray.on_ray.cluster import living_nodes
from bam_ray.on_ray.proxy import PROXY_ENVIRONMENT
from bam_ray.on_ray.replica import Endpoint, EndpointAccess
from bam_ray.on_ray.scaling import replicas_for_load
from bam_ray.pipeline.run import PipelineRun
from bam_ray.scheduling.nodes import HEAD, NodeFacts, describe_nodes, describe_request, ray_resources, worker_capacity
from bam_ray.settings import Recipe, ReplicaRange, ServeSettings, load_recipe
from bam_ray.terminal import warn

APP = "bam"
FOLLOWER = "bam-follower"  # the name of the actor of follow mode
NAMESPACE = "bam"  # that of the actor
POSTERIOR = "posterior"  # the name of the posterior ensemble, at the endpoint as in the report
SEED = "seed"  # the name of the seed, which adapters change
ANY_HOST = {"0.0.0.0", "::"}
OTHER_REQUESTS = 32
"""Requests that a replica takes besides those that it computes and queues: /health, /metrics, and those that it refuses
with the time to wait."""
QUEUED_PER_PROXY = 1024  # requests that wait in the proxy for a replica; it refuses more
REFUSAL = BackpressureConfig(status_code=429, retry_after_s=1)
LOOK_BACK_SECONDS = 10.0  # over which the load is averaged
DRAIN_SECONDS = 60.0  # time that a replica has to finish its requests when it is replaced or stopped


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
    if recipe.serve.follow:
        raise SettingsError(
            "serve.follow cannot be used with a Serve configuration file, which would change without the file: add the "
            "override serve.follow=false"
        )
    run = PipelineRun.of(recipe, open_store(recipe.store.uri, recipe.store.endpoint))
    models, name = served_models(run)
    access = EndpointAccess.of(recipe.serve, is_local=False)
    return _application(models, name, recipe.serve, access, surge=False, run=run)


def served_kinds(recipe: Recipe) -> Collection[ArtifactKind]:
    """Return the kinds of artifacts that must be made before the recipe can be served."""
    if recipe.serve.mode == "adapters":
        assert recipe.serve.adapters is not None
        return [ArtifactKind.ADAPTERS if recipe.serve.adapters.source is None else ArtifactKind.SEEDS]
    return [ArtifactKind.BRANCHES if recipe.serve.mode == "posterior" else ArtifactKind.MIXTURES]


def without_controls(recipe: Recipe) -> Recipe:
    """Return the recipe without the controls of its adapters, which are never served. All identities stay the same."""
    if recipe.adapters is None:
        return recipe
    return recipe.model_copy(update={"adapters": recipe.adapters.model_copy(update={"controls": ()})})


def served_name(recipe: Recipe) -> str:
    """Return the name of the model in requests."""
    names = {"posterior": POSTERIOR, "adapters": SEED}
    return names.get(recipe.serve.mode) or recipe.serve.mixture or next(iter(recipe.upcycle.mixtures))


def served_models(run: PipelineRun) -> tuple[list[Artifact], str]:
    """Return the artifacts that the recipe serves, and the name of the model that they are together.

    They are one mixture, with `serve.mode` adapters the seed, or with `serve.mode` posterior the seed and all branches
    that are committed and have all their files.

    Raises:
        CheckpointError: The ensemble would have no branch.
    """
    recipe = run.recipe
    if recipe.serve.mode == "mixture":
        name = served_name(recipe)
        return [run.artifact(ArtifactKind.MIXTURES, name)], name
    if recipe.serve.mode == "adapters":
        return [run.artifact(ArtifactKind.SEEDS, "seed")], SEED
    branches = [run.artifact(ArtifactKind.BRANCHES, domain) for domain in recipe.branch.domains]
    patiently = retry_on(StoreUnavailable, warn)
    whole = [branch for branch in branches if patiently(branch.has_all_files)]
    if not whole:
        raise CheckpointError(f"no branch of {run.store.uri} is committed: run the stage that makes them, then serve")
    return [run.artifact(ArtifactKind.SEEDS, "seed"), *whole], POSTERIOR


def deploy(
    artifacts: Sequence[Artifact],
    model_name: str,
    settings: ServeSettings,
    access: EndpointAccess | None = None,
    run: PipelineRun | None = None,
) -> str:
    """Serve a model, and return the base URL for OpenAI clients when all replicas answer.

    Args:
        artifacts: The model, or the members of a posterior ensemble with the seed first.
        model_name: The name of the model in requests.
        settings: The settings of the endpoint.
        access: The clients that are served. None: those that the settings name.
        run: The run whose adapters are served, with `serve.mode` adapters.

    Raises:
        SettingsError: The list of API keys is missing or wrong.
        CheckpointError: An artifact is not committed.
        PlacementError: The nodes can never hold the replicas.
        ServingError: The port is taken, or a replica does not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    access = access or EndpointAccess.of(settings, settings.is_local)
    nodes = living_nodes()
    surge = _has_spare_capacity(settings, nodes)
    app = _application(artifacts, model_name, settings, access, surge, run)
    head = next(node for node in nodes if HEAD in node.resources)
    _start_serve(settings, head)
    try:
        serve.run(app, name=APP, route_prefix="/")
    except RuntimeError as error:
        raise ServingError(f"{model_name} could not be served: {_replica_error() or error}") from None
    host = head.address if settings.host in ANY_HOST else settings.host
    return f"http://{host}:{settings.port}/v1"


def _application(
    artifacts: Sequence[Artifact],
    model_name: str,
    settings: ServeSettings,
    access: EndpointAccess,
    surge: bool,
    run: PipelineRun | None,
) -> Application:
    """Return the endpoint as Serve runs it. With `surge`, one more replica may run while replicas are replaced."""
    for artifact in artifacts:
        if not retry_on(StoreUnavailable, warn)(artifact.is_committed):
            raise CheckpointError(f"{artifact.uri} is not committed: run the stage that makes it, then serve")
    deployment = serve.deployment(Endpoint, name="endpoint").options(
        **_replica_numbers(settings),
        max_surge_percent=1 if surge else 0,  # Serve rounds up to a whole replica
        max_ongoing_requests=settings.slots + settings.max_queued_prompts + OTHER_REQUESTS,
        max_queued_requests=QUEUED_PER_PROXY,
        backpressure_config=REFUSAL,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        ray_actor_options=replica_options(settings),
    )
    return deployment.bind(artifacts, model_name, settings, access, run)


def _replica_numbers(settings: ServeSettings) -> dict[str, Any]:
    """Return the options of Ray Serve for the number of replicas."""
    replicas = settings.replicas
    if not isinstance(replicas, ReplicaRange):
        return {"num_replicas": replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            upscale_delay_s=replicas.up_seconds,
            downscale_delay_s=replicas.down_seconds,
            look_back_period_s=LOOK_BACK_SECONDS,
            policy=AutoscalingPolicy(policy_function=replicas_for_load),
        )
    }


def replica_options(settings: ServeSettings) -> dict[str, Any]:
    """Return the options of Ray for a process with the resources of a replica."""
    resources = ray_resources(settings.needs)
    return {
        "num_cpus": resources.get("CPU", 0.0),
        "num_gpus": resources.get("GPU", 0.0),
        "memory": resources.get("memory", 0.0),
        "label_selector": settings.needs.labels,
    }


def shutdown() -> None:
    """Stop the endpoint, its follower and Ray Serve; does nothing if they are not running."""
    stop_following()  # it may be deploying a new model, which would then wait for Ray Serve forever
    serve.shutdown()


def stop_following() -> None:
    """End the follower of the endpoint, if there is one."""
    try:
        ray.kill(ray.get_actor(FOLLOWER, NAMESPACE))
    except ValueError:  # there is none
        return


def _has_spare_capacity(settings: ServeSettings, nodes: list[NodeFacts]) -> bool:
    """Return True if one more replica fits on the nodes; raises `PlacementError` if the replicas themselves do not."""
    least, most = settings.least_replicas, settings.most_replicas
    fitting = worker_capacity(settings.needs, nodes, most + 1)
    if fitting < least:
        raise PlacementError(
            f"{least} replica(s) of {describe_request(settings.needs)} can never fit on the {len(nodes)} "
            f"living nodes ({describe_nodes(nodes)}): change serve.needs or serve.replicas, or add nodes"
        )
    if settings.follow and fitting <= most:
        raise PlacementError(
            f"serve.follow needs room for one more replica of {describe_request(settings.needs)}, to replace {most} "
            f"without an outage ({describe_nodes(nodes)}): lower serve.replicas, or add nodes"
        )
    return fitting > most


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
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=settings.host, port=settings.port),
            controller_options=ControllerOptions(runtime_env={"env_vars": PROXY_ENVIRONMENT}),
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
