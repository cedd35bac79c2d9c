"""The models of an endpoint over time: deployment, rollback, and follow mode.

    models, url = serve_run(run)      # deploys what the recipe serves, and records it in the store
    models, url = roll_back(run)      # deploys what was served before

With `serve.follow`, an actor on the head node looks for models that the run has committed since: another mixture of the
same name, or more branches of an ensemble. A model is loaded and tested in a process of its own, with the resources of
a replica. If it passes, it replaces the present one replica by replica. Otherwise the present one stays, and the record
of the endpoint has the reason. Models that were committed before the last deployment are not rolled out, so a rollback
lasts until the run commits something new.

The actor outlives the job, and the restart of its process. It ends when Ray Serve is shut down.
"""

import logging
import threading
import time
from collections.abc import Sequence

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bam_ray.blobs import BlobStore
from bam_ray.blobs.patience import retry_on
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.endpoint_record import (
    EndpointRecord,
    ServedIds,
    committed_mixtures,
    read_endpoint,
    write_endpoint,
)
from bam_ray.errors import BamError, CheckpointError, ServingError, StoreError, StoreUnavailable, one_line
from bam_ray.on_ray.cluster import living_nodes
from bam_ray.on_ray.replica import EndpointAccess, try_models
from bam_ray.on_ray.serve_app import (
    APP,
    FOLLOWER,
    NAMESPACE,
    deploy,
    replica_options,
    served_models,
    served_name,
    stop_following,
)
from bam_ray.pipeline.run import PipelineRun
from bam_ray.scheduling.nodes import HEAD
from bam_ray.terminal import warn

POLL_SECONDS = 10.0  # time between two looks at the store
TEST_SECONDS = 1800.0  # time in which a new model must find free resources and pass its test

_logger = logging.getLogger(__name__)


def serve_run(run: PipelineRun) -> tuple[list[Artifact], str]:
    """Serve what the recipe serves, and return the models and the base URL.

    Raises the errors of `served_models` and of `deploy`. A follower of an earlier deployment has then ended.
    """
    models, name = served_models(run)
    before = retry_on(StoreUnavailable, warn)(read_endpoint, run.store, name)
    new = before.serve(_ids(models)) if before else EndpointRecord(name=name, served=_ids(models))
    return models, _deploy(run, new)


def roll_back(run: PipelineRun) -> tuple[list[Artifact], str]:
    """Serve again what was served before the present models, and return the models and the base URL.

    Raises:
        CheckpointError: Nothing else was served under this name, it is not in the store any more, or it is a seed that
            the adapters of the recipe do not belong to.
        PlacementError: The nodes can never hold the replicas.
        ServingError: A replica does not start.
    """
    name = served_name(run.recipe)
    record = retry_on(StoreUnavailable, warn)(read_endpoint, run.store, name)
    if record is None:
        raise CheckpointError(f"{run.store.uri} has no record of an endpoint {name}: serve it with `bam serve` first")
    new = record.roll_back()
    if run.recipe.serve.mode == "adapters" and new.served != _ids(served_models(run)[0]):
        raise CheckpointError(
            f"{' + '.join(new.served)} was served before, and the adapters of the recipe belong to another seed: serve "
            "the recipe of that seed"
        )
    return _models(run.store, new.served), _deploy(run, new)


def _deploy(run: PipelineRun, record: EndpointRecord) -> str:
    """Deploy the models of a new record, write the record, and return the URL."""
    settings = run.recipe.serve
    access = EndpointAccess.of(settings, settings.is_local)
    patiently = retry_on(StoreUnavailable, warn)
    known = [_ids(models) for models in patiently(new_models, run, record)]
    stop_following()  # it could deploy something else at the same time
    url = deploy(_models(run.store, record.served), record.name, settings, access, run)
    patiently(write_endpoint, run.store, record.see(known).model_copy(update={"url": url}))
    if settings.follow:
        head = next(node for node in living_nodes() if HEAD in node.resources)
        ray.remote(Follower).options(
            name=FOLLOWER,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(head.id, soft=False),
        ).remote(run, record.name, access)
    return url


class Follower:
    """The actor that rolls out what the run commits after the endpoint was deployed.

    Args:
        run: The run that is served.
        name: The name of the model in requests.
        access: The clients that the endpoint serves.
    """

    def __init__(self, run: PipelineRun, name: str, access: EndpointAccess) -> None:
        self._run, self._name, self._access = run, name, access
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            try:
                if not _is_served():
                    ray.kill(ray.get_runtime_context().current_actor)
                self._roll_out_newest()
            except Exception as error:  # of any type: the next look at the store may succeed
                _logger.warning("new models were not looked for: %s", one_line(error))

    def _roll_out_newest(self) -> None:
        """Roll out the newest models that are not known yet, if they pass their test."""
        run, record = self._run, read_endpoint(self._run.store, self._name)
        new = new_models(run, record) if record else []
        if not record or not new:
            return
        models, ids = new[-1], _ids(new[-1])
        record = record.see([_ids(each) for each in new])
        failure = self._test(models)
        is_deployed = not failure
        if is_deployed:
            write_endpoint(run.store, record.serve(ids))
            try:
                deploy(models, self._name, run.recipe.serve, self._access)
            except (BamError, RayError) as error:
                failure = one_line(error)
        if not failure:
            _logger.warning("%s is served now", " + ".join(ids))
            return
        note = f"{' + '.join(ids)} is not served: {failure}"
        _logger.warning(note)
        write_endpoint(run.store, record.model_copy(update={"note": note}))
        if is_deployed:
            deploy(_models(run.store, record.served), self._name, run.recipe.serve, self._access)

    def _test(self, models: Sequence[Artifact]) -> str:
        """Test models in a process of their own. Returns why they cannot be served; empty if they can.

        Raises `StoreError` or `ServingError` if nothing is known of the models yet.
        """
        settings = self._run.recipe.serve
        options = replica_options(settings)
        test = ray.remote(max_retries=0, max_calls=1, **options)(try_models).remote(models, settings)
        try:
            ray.get(test, timeout=TEST_SECONDS)
        except GetTimeoutError:
            ray.cancel(test, force=True)
            raise ServingError(f"the test of {' + '.join(_ids(models))} found no free resources, or hung") from None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, StoreError):
                raise cause from None
            return one_line(cause) if isinstance(cause, BamError) else f"{type(cause).__name__}: {one_line(cause)}"
        except RayError as error:  # the process died
            return f"its test ended: {one_line(error)}"
        return ""


def _is_served() -> bool:
    """Return False if the endpoint or Ray Serve was shut down."""
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    except ValueError:  # `serve.status` would ask the controller that has ended
        return False
    return APP in serve.status().applications


def new_models(run: PipelineRun, record: EndpointRecord) -> list[list[Artifact]]:
    """Return the committed models that could be served under the name and are not in `record.seen`, oldest first."""
    if run.recipe.serve.mode == "mixture":
        return [[mixture] for mixture in committed_mixtures(run.store, record.name, record.seen)]
    models, _ = served_models(run)
    return [] if _ids(models) in record.seen else [models]


def _ids(models: Sequence[Artifact]) -> ServedIds:
    return tuple(model.prefix for model in models)


def _models(store: BlobStore, ids: ServedIds) -> list[Artifact]:
    return [Artifact(store, ArtifactKind(kind), id) for kind, _, id in (each.partition("/") for each in ids)]
