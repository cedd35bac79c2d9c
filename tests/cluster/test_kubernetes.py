"""The KubeRay manifests, validated offline with the schemas of KubeRay and Ray, and against the image."""

import copy
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from ray._common.utils import import_attr
from ray.scripts.scripts import start
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from ray.util.accelerators import accelerators

from bam_ray.checkpoint.manifest import Manifest
from bam_ray.errors import CheckpointError, SettingsError
from bam_ray.on_ray.job import run_of
from bam_ray.on_ray.proxy import PROXY_ENVIRONMENT
from bam_ray.on_ray.serve_app import served_models
from bam_ray.pipeline.graph import task_graph
from bam_ray.settings import Recipe, load_recipe
from tests.support.cluster.manifests import ROOT, crd_validator, errors, facts, gib, load_manifest, unmet

PATHS = {kind: f"cluster/kuberay/{kind.lower()}.yaml" for kind in ("RayCluster", "RayJob", "RayService")}
CLUSTER_OF = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALLED = "/opt/bam_ray/"  # the repository inside the image
KNOWN = {value for name, value in vars(accelerators).items() if name.isupper()}

every_kind = pytest.mark.parametrize("kind", PATHS)


def cluster_of(kind: str) -> Any:
    """Return the specification of the Ray cluster in a manifest."""
    spec = load_manifest(PATHS[kind], kind)["spec"]
    return spec[CLUSTER_OF[kind]] if kind in CLUSTER_OF else spec


def containers(kind: str) -> list[Any]:
    cluster = cluster_of(kind)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


@every_kind
def test_kuberay_accepts_the_manifest_and_rejects_typos(kind: str) -> None:
    validator = crd_validator(kind)
    manifest = load_manifest(PATHS[kind], kind)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert errors(validator, manifest) == []
    for path, wrong in [
        (("headGroupSpec", "template", "spec", "containers", 0), {"img": "x"}),
        (("headGroupSpec",), {"rayStartParam": {}}),
        (("workerGroupSpecs", 0), {"minReplica": 1}),
        (("workerGroupSpecs", 0), {"maxReplicas": "8"}),
        (("authOptions",), {"mode": "tokens"}),
    ]:
        mutant = copy.deepcopy(manifest)
        part = mutant["spec"][CLUSTER_OF[kind]] if kind in CLUSTER_OF else mutant["spec"]
        for key in path:
            part = part[key]
        part.update(wrong)
        assert len(errors(validator, mutant)) == 1


@every_kind
def test_ray_and_image_versions_match_the_package(kind: str) -> None:
    cluster = cluster_of(kind)
    (ray,) = [needed for needed in PROJECT["dependencies"] if needed.startswith("ray[")]
    assert cluster["rayVersion"] in SpecifierSet(ray.partition("]")[2])
    images = {container["image"] for container in containers(kind)}
    assert images == {f"registry.example.com/bam-ray:{PROJECT['version']}"}
    assert images.pop() in (ROOT / "cluster/Containerfile").read_text()


@every_kind
def test_a_token_protects_the_cluster(kind: str) -> None:
    cluster = cluster_of(kind)
    assert cluster["authOptions"] == {"mode": "token"}
    for container in containers(kind):
        assert container["envFrom"] == [{"secretRef": {"name": "bam-s3"}}]
        variables = [each["name"] for each in container.get("env", [])]
        assert variables == ([*PROXY_ENVIRONMENT, "BAM_API_KEYS"] if kind == "RayService" else [])
    host = cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"]
    # The operator must reach the dashboard of a cluster that it submits or deploys to. No Service exposes it
    assert host == ("127.0.0.1" if kind == "RayCluster" else "0.0.0.0")
    assert "serviceType" not in cluster["headGroupSpec"]


@every_kind
def test_ray_accepts_the_start_parameters(kind: str) -> None:
    cluster = cluster_of(kind)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        flags = {"disable-usage-stats"}
        parameters = group["rayStartParams"].items()
        words = [f"--{name}" if name in flags else f"--{name}={value}" for name, value in parameters]
        start.make_context("ray start", words)  # exits on an unknown option


@every_kind
def test_requests_and_labels_support_placement(kind: str) -> None:
    cluster = cluster_of(kind)
    for group in cluster["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        # Ray declares the limits as resources; with lower requests a node would declare more than it may get
        assert container["resources"]["requests"] == container["resources"]["limits"]
        is_for_mixtures = group["groupName"] == "mix-a100"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == ("8" if is_for_mixtures else "1")
        assert (group["labels"].get("bam/kind") == "mix") is is_for_mixtures
        assert (group["minReplicas"] == 0) is is_for_mixtures
        assert group["labels"]["ray.io/accelerator-type"] in KNOWN
        wants_spot = group["labels"]["ray.io/market-type"] == "spot"
        assert ("cloud.google.com/gke-spot" in group["template"]["spec"]["nodeSelector"]) is wants_spot
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    if kind != "RayService":
        labels = [group["labels"] for group in cluster["workerGroupSpecs"] if group["groupName"] != "mix-a100"]
        assert len({label["ray.io/accelerator-type"] for label in labels}) == 2
        assert {label["ray.io/market-type"] for label in labels} == {"spot"}


def recipe_of(kind: str) -> Recipe:
    """Return the recipe that a manifest runs or serves."""
    if kind == "RayService":
        arguments = serve_config()["applications"][0]["args"]
        return load_recipe(in_repository(arguments["recipe"]), arguments["overrides"])
    if kind == "RayJob":
        _, script, flag, recipe, *overrides = shlex.split(load_manifest(PATHS[kind], kind)["spec"]["entrypoint"])
        assert flag == "--recipe"
        assert in_repository(script).exists()
        return load_recipe(in_repository(recipe), overrides)
    return load_recipe(ROOT / "recipes/demo.yaml", ["branch.needs.gpus=1", "mix.needs.gpus=1"])


def serve_config() -> Any:
    return yaml.safe_load(load_manifest(PATHS["RayService"], "RayService")["spec"]["serveConfigV2"])


def in_repository(path: str) -> Path:
    """Return the path in the repository of a file at `path` in the image."""
    assert path.startswith(INSTALLED)
    inside = path.removeprefix(INSTALLED)
    assert re.search(rf"^COPY {inside.partition('/')[0]} ", (ROOT / "cluster/Containerfile").read_text(), re.MULTILINE)
    return ROOT / inside


@every_kind
def test_the_smallest_cluster_can_run_its_recipe(kind: str) -> None:
    cluster = cluster_of(kind)
    nodes = []
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        has = {"CPU": float(limits["cpu"]), "memory": gib(limits["memory"]) * 2**30}
        has |= {"GPU": float(limits.get("nvidia.com/gpu", 0))}
        count = group.get("minReplicas", 1)
        nodes += [facts(f"{group.get('groupName', 'head')}-{number}", has, group["labels"]) for number in range(count)]
    recipe = recipe_of(kind)
    if kind == "RayService":
        assert recipe.serve.needs.gpus <= sum(node.resources["GPU"] for node in nodes)
        assert recipe.serve.least_replicas <= sum(group["minReplicas"] for group in cluster["workerGroupSpecs"])
        return
    assert unmet(task_graph(recipe), nodes) == []


def test_the_service_deploys_the_mixture_of_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pod in ("headGroupSpec", "workerGroupSpecs"):
        groups = cluster_of("RayService")[pod]
        for group in groups if isinstance(groups, list) else [groups]:
            proxy, variable = group["template"]["spec"]["containers"][0]["env"]
            assert {proxy["name"]: proxy["value"]} == PROXY_ENVIRONMENT
            assert variable["valueFrom"] == {"secretKeyRef": {"name": "bam-api-keys", "key": "keys"}}
            monkeypatch.setenv(variable["name"], f"{'0' * 64} name=alice")
    schema = ServeDeploySchema.model_validate(serve_config())
    assert schema.http_options.host == "0.0.0.0"  # the address of the pod: a Kubernetes Service forwards to it
    (application,) = schema.applications
    builder = import_attr(application.import_path)
    # Replace the path in the image and the bucket by local ones
    recipe = str(in_repository(application.args["recipe"]))
    overrides = [*application.args["overrides"], f"store.uri={tmp_path}"]
    defaults: dict[str, Any] = {"recipe": recipe, "overrides": overrides}

    def build(**arguments: Any) -> Application:
        return call_user_app_builder_with_args_if_necessary(builder, defaults | arguments)

    with pytest.raises(CheckpointError, match="not committed: run the stage that makes it"):
        build()
    (mixture,), name = served_models(run_of(load_recipe(recipe, overrides)))
    (tmp_path / "empty").mkdir()
    mixture.publish(tmp_path / "empty", Manifest(id=mixture.id, kind="mixtures", name=name))
    assert isinstance(build(), Application)
    with pytest.raises(SettingsError, match="serve"):
        build(overrides=[*overrides, "serve.port=zero"])
    with pytest.raises(SettingsError, match="needs API keys"):
        build(overrides=[*overrides, "serve.api_keys=null"])
    assert isinstance(build(overrides=[*overrides, "serve.api_keys=null", "serve.open=true"]), Application)
    monkeypatch.setenv("BAM_API_KEYS", "")
    with pytest.raises(SettingsError, match="has no key"):
        build()
    with pytest.raises(ValueError, match="override"):
        build(override=[])
