"""The `ray up` files are valid for Ray, the clouds, the shell and this package; checked without a cloud."""

import copy
import re
import shlex
import subprocess
import tomllib
from typing import Any

import botocore.session
import jsonschema
import pytest
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start
from ray.util.accelerators import accelerators

from bam_ray.pipeline.graph import task_graph
from bam_ray.settings import load_recipe
from tests.support.cluster.manifests import ROOT, errors, facts, gce_validator, load, unmet

FILES = ["cluster/aws.yaml", "cluster/gcp.yaml"]
ON_GPUS = ["branch.needs.gpus=1", "mix.needs.gpus=1", "serve.needs.gpus=1"]
KNOWN = {value for name, value in vars(accelerators).items() if name.isupper()}


def prepared(config: Any) -> Any:
    """Return the configuration as `ray up` uses it; raises if `ray up` would."""
    ready = prepare_config(copy.deepcopy(config))
    validate_config(ready)
    return ready


def typos(config: Any) -> list[Any]:
    """Return copies of the configuration that have one typo each."""
    copies = []
    for path, name, wrong in [
        ((), "max_workers", "max_worker"),
        (("available_node_types", "head"), "node_config", "node_cfg"),
        (("available_node_types", "spot-l4"), "labels", "label"),
        (("auth",), "ssh_user", "ssh_usr"),
    ]:
        copy_with_typo = copy.deepcopy(config)
        part = copy_with_typo
        for key in path:
            part = part[key]
        part[wrong] = part.pop(name)
        copies.append(copy_with_typo)
    copy_with_typo = copy.deepcopy(config)
    copy_with_typo["head_node_type"] = "haed"
    return [*copies, copy_with_typo]


@pytest.mark.parametrize("path", FILES)
def test_ray_accepts_the_file_and_finds_typos(path: str) -> None:
    config = load(path)
    prepared(config)
    for copy_with_typo in typos(config):
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            prepared(copy_with_typo)


def kinds(path: str) -> dict[str, Any]:
    types: dict[str, Any] = load(path)["available_node_types"]
    return types


def test_ec2_accepts_the_instances() -> None:
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in kinds(FILES[0]).values():
        request = kind["node_config"] | {"MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(request, shape).has_errors()
        assert request["InstanceType"] in shape.members["InstanceType"].enum
        assert ParamValidator().validate(request | {"InstanceMarketOption": {}}, shape).has_errors()
        spot = request.get("InstanceMarketOptions", {}).get("MarketType")
        assert spot == (None if kind["labels"]["ray.io/market-type"] == "on-demand" else "spot")


def test_compute_engine_accepts_the_instances() -> None:
    validator = gce_validator()
    for kind in kinds(FILES[1]).values():
        request = kind["node_config"]
        assert errors(validator, request) == []
        assert len(errors(validator, request | {"machinetype": "n2-standard-8"})) == 1
        assert len(errors(validator, request | {"scheduling": {"provisioningModel": "SPOTTED"}})) == 1
        spot = request.get("scheduling", {}).get("provisioningModel")
        assert spot == (None if kind["labels"]["ray.io/market-type"] == "on-demand" else "SPOT")


@pytest.mark.parametrize("path", FILES)
def test_the_head_is_on_demand_and_workers_are_spot_nodes(path: str) -> None:
    types = kinds(path)
    head = types.pop(load(path)["head_node_type"])
    assert head["labels"] == {"ray.io/market-type": "on-demand"}
    assert "GPU" not in head["resources"]
    labels = [worker["labels"] for worker in types.values()]
    assert {label["ray.io/market-type"] for label in labels} == {"spot"}
    accelerator_types = {label["ray.io/accelerator-type"] for label in labels}
    assert len(accelerator_types) == 2
    assert accelerator_types <= KNOWN  # the names that Ray itself uses
    assert all(worker["resources"]["GPU"] == 1 for worker in types.values())


@pytest.mark.parametrize("path", FILES)
def test_the_smallest_cluster_can_run_every_task(path: str) -> None:
    nodes = []
    for name, kind in kinds(path).items():
        count = 1 if name == load(path)["head_node_type"] else kind["min_workers"]
        nodes += [facts(f"{name}-{number}", kind["resources"], kind["labels"]) for number in range(count)]
    tasks = task_graph(load_recipe(ROOT / "recipes/demo.yaml", ON_GPUS))
    assert unmet(tasks, nodes) == []
    assert unmet(tasks, nodes[:1]) != []


@pytest.mark.parametrize("path", FILES)
def test_commands_start_ray_with_a_token(path: str) -> None:
    ready = prepared(load(path))
    lists = [name for name in ready if name.endswith("_commands")]
    for command in [command for name in lists for command in ready[name]]:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    for name, head in (("head_start_ray_commands", True), ("worker_start_ray_commands", False)):
        stopping, starting, *more = ready[name]
        assert stopping == "~/venv/bin/ray stop"
        assert "RAY_AUTH_MODE=token" in starting
        options = ray_start_options(starting)
        assert options["head"] is head
        if head:
            assert options["dashboard_host"] == "127.0.0.1"
            assert options["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
        else:
            assert options["address"] == "$RAY_HEAD_IP:6379"
            (watcher,) = more
            cloud = load(path)["provider"]["type"]
            assert f"-m bam_ray.on_ray.spot {cloud} $RAY_HEAD_IP:6379" in watcher and "RAY_AUTH_MODE=token" in watcher


def ray_start_options(command: str) -> dict[str, Any]:
    """Return the options as `ray start` parses them; it exits if an option is unknown."""
    words = shlex.split(command.rpartition("ray start")[2])
    options: dict[str, Any] = start.make_context("ray start", words).params
    return options


@pytest.mark.parametrize("path", FILES)
def test_mounted_files_are_those_of_the_installation(path: str) -> None:
    config = load(path)
    mounts = config["file_mounts"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = ["pyproject.toml", project["readme"], *project["license-files"], "bam_ray"]
    for needed in needs:
        assert (ROOT / needed).exists()
        assert mounts[f"~/bam_ray/{needed}"] == needed
    # Ray reads every file of a mount to find changes, and `.` would include .venv and all data
    own = [source for source in mounts.values() if not source.startswith("~/")]
    assert sorted(own) == sorted(needs)
    assert "~/venv/bin/pip install --quiet ~/bam_ray" in config["setup_commands"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert re.search(r"chmod 600 .*~/.ray/auth_token", " ".join(config["setup_commands"]))


PUBLIC = [*ROOT.glob("cluster/**/*"), *ROOT.glob("recipes/*"), *ROOT.glob("docs/*"), *ROOT.glob("jobs/*")]
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}"  # access keys of AWS
    r"|(?i:secret_access_key|secret_key|auth_token|password)['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9+/_-]{12,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
)


def test_no_public_file_contains_a_secret() -> None:
    for planted in (
        "AKIAIOSFODNN7EXAMPLE",
        "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG",
        'RAY_AUTH_TOKEN: "0123456789abcdef"',
    ):
        assert SECRET.search(planted)
    texts = {path: path.read_text() for path in PUBLIC if path.is_file() and path.suffix != ".pyc"}
    assert len(texts) > 15
    assert {str(path): SECRET.findall(text) for path, text in texts.items() if SECRET.search(text)} == {}


def test_commands_of_the_guide_are_valid() -> None:
    guide = (ROOT / "docs/clusters.md").read_text()
    named = set(re.findall(r"(?:cluster|recipes|jobs)/[\w./-]*\w", guide)) - {"recipes/my-run.yaml"}
    assert {"cluster/aws.yaml", "cluster/gcp.yaml", "cluster/Containerfile"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    manifests = {path.name for path in (ROOT / "cluster/kuberay").iterdir()}
    assert all(f"`{name}`" in guide for name in manifests)
    blocks = re.findall(r"^```\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        subprocess.run(["bash", "-n", "-c", block], check=True)
