"""The `ray up` files, validated offline with the schemas of Ray and of the clouds, the shell and this package."""

import copy
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
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
    """Prepare and validate a configuration like `ray up`, with the same errors."""
    ready = prepare_config(copy.deepcopy(config))
    validate_config(ready)
    return ready


def typos(config: Any) -> list[Any]:
    """Return copies of a configuration with one error each."""
    mutants = []
    for path, name, wrong in [
        ((), "max_workers", "max_worker"),
        (("available_node_types", "head"), "node_config", "node_cfg"),
        (("available_node_types", "spot-l4"), "labels", "label"),
        (("auth",), "ssh_user", "ssh_usr"),
    ]:
        mutant = copy.deepcopy(config)
        part = mutant
        for key in path:
            part = part[key]
        part[wrong] = part.pop(name)
        mutants.append(mutant)
    mutant = copy.deepcopy(config)
    mutant["head_node_type"] = "haed"
    return [*mutants, mutant]


@pytest.mark.parametrize("path", FILES)
def test_ray_accepts_the_file_and_rejects_typos(path: str) -> None:
    config = load(path)
    prepared(config)
    for mutant in typos(config):
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            prepared(mutant)


def kinds(path: str) -> dict[str, Any]:
    types: dict[str, Any] = load(path)["available_node_types"]
    return types


def test_ec2_accepts_the_instances() -> None:
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in kinds(FILES[0]).values():
        instance = kind["node_config"] | {"MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(instance, shape).has_errors()
        assert instance["InstanceType"] in shape.members["InstanceType"].enum
        assert ParamValidator().validate(instance | {"InstanceMarketOption": {}}, shape).has_errors()
        spot = instance.get("InstanceMarketOptions", {}).get("MarketType")
        assert spot == (None if kind["labels"]["ray.io/market-type"] == "on-demand" else "spot")


def test_compute_engine_accepts_the_instances() -> None:
    validator = gce_validator()
    for kind in kinds(FILES[1]).values():
        instance = kind["node_config"]
        assert errors(validator, instance) == []
        assert len(errors(validator, instance | {"machinetype": "n2-standard-8"})) == 1
        assert len(errors(validator, instance | {"scheduling": {"provisioningModel": "SPOTTED"}})) == 1
        spot = instance.get("scheduling", {}).get("provisioningModel")
        assert spot == (None if kind["labels"]["ray.io/market-type"] == "on-demand" else "SPOT")


@pytest.mark.parametrize("path", FILES)
def test_workers_are_spot_gpus_of_two_types(path: str) -> None:
    types = kinds(path)
    head = types.pop(load(path)["head_node_type"])
    assert head["labels"] == {"ray.io/market-type": "on-demand"}
    assert "GPU" not in head["resources"]
    mix = types.pop("mix-a100")
    labels = [worker["labels"] for worker in types.values()]
    assert {label["ray.io/market-type"] for label in labels} == {"spot"}
    accelerator_types = {label["ray.io/accelerator-type"] for label in labels}
    assert len(accelerator_types) == 2
    assert accelerator_types <= KNOWN  # the names that Ray itself uses
    assert all(worker["resources"]["GPU"] == 1 for worker in types.values())
    assert mix["labels"] == {"ray.io/accelerator-type": "A100", "ray.io/market-type": "on-demand", "bam/kind": "mix"}
    assert (mix["resources"]["GPU"], mix["min_workers"]) == (8, 0)


def test_nodes_for_mixtures_are_close_and_fast() -> None:
    aws, gcp = (kinds(path)["mix-a100"]["node_config"] for path in FILES)
    assert aws["Placement"] == {"GroupName": "bam-mix"}
    assert [interface["InterfaceType"] for interface in aws["NetworkInterfaces"]] == ["efa"]
    (policy,) = gcp["resourcePolicies"]
    assert policy.endswith("/resourcePolicies/bam-mix")
    assert [interface["nicType"] for interface in gcp["networkInterfaces"]] == ["GVNIC"]
    guide = (ROOT / "docs/clusters.md").read_text()
    assert "create-placement-group --group-name bam-mix" in guide and "group-placement bam-mix" in guide


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
def test_ray_starts_with_a_token_and_a_private_dashboard(path: str) -> None:
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
    """Return the options as `ray start` parses them. It exits on an unknown option."""
    words = shlex.split(command.rpartition("ray start")[2])
    options: dict[str, Any] = start.make_context("ray start", words).params
    return options


@pytest.mark.parametrize("path", FILES)
def test_the_mounted_files_are_those_that_pip_needs(path: str) -> None:
    config = load(path)
    mounts = config["file_mounts"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = ["pyproject.toml", project["readme"], *project["license-files"], "bam_ray", "requirements"]
    for needed in needs:
        assert (ROOT / needed).exists()
        assert mounts[f"~/bam_ray/{needed}"] == needed
    # Ray hashes every file of a mount, so mounting `.` would include .venv and all data
    own = [source for source in mounts.values() if not source.startswith("~/")]
    assert sorted(own) == sorted(needs)
    installing = [command for command in config["setup_commands"] if command.startswith("~/venv/bin/pip install")]
    assert [command.split()[3:] for command in installing] == [
        ["--no-deps", "--require-hashes", "-r", "~/bam_ray/requirements/image.txt"],
        ["-r", "~/bam_ray/requirements/torch.txt"],
        ["--no-deps", "--no-build-isolation", "~/bam_ray"],
    ]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert re.search(r"chmod 600 .*~/.ray/auth_token", " ".join(config["setup_commands"]))


PUBLIC = [*ROOT.glob("cluster/**/*"), *ROOT.glob("recipes/*"), *ROOT.glob("docs/*"), *ROOT.glob("jobs/*")]
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}"  # access keys of AWS
    r"|(?i:secret_access_key|secret_key|auth_token|password)['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9+/_-]{12,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
)


def test_no_file_contains_a_secret() -> None:
    for planted in (
        "AKIAIOSFODNN7EXAMPLE",
        "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG",
        'RAY_AUTH_TOKEN: "0123456789abcdef"',
    ):
        assert SECRET.search(planted)
    texts = {path: path.read_text() for path in PUBLIC if path.is_file() and path.suffix != ".pyc"}
    assert len(texts) > 15
    assert {str(path): SECRET.findall(text) for path, text in texts.items() if SECRET.search(text)} == {}


BLOCKS = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = [
    "ACCOUNT_ID",
    "PROJECT_ID",
    "SECURITY_GROUP_ID",
    "SSH_PUBLIC_KEY",
    "SUBNET_ID",
    "YOUR_ADDRESS",
    ":::BUCKET",
    "s3://BUCKET",
    "registry.example",
]


def test_the_commands_of_the_guide_parse_and_their_files_exist() -> None:
    guide = (ROOT / "docs/clusters.md").read_text()
    named = set(re.findall(r"(?:cluster|recipes|jobs)/[\w./-]*\w", guide)) - {"recipes/my-run.yaml"}
    assert {"cluster/aws.yaml", "cluster/gcp.yaml", "cluster/Containerfile"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    manifests = {path.name for path in (ROOT / "cluster/kuberay").iterdir()}
    assert all(f"`{name}`" in guide for name in manifests)
    for block in BLOCKS.findall(guide):
        subprocess.run(["bash", "-n", "-c", block], check=True)
    assert len(BLOCKS.findall(guide)) > 5


def test_the_commands_of_the_guide_replace_every_placeholder(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "cluster", tmp_path / "cluster", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".yaml")]
    assert all(any(name in contents(path) for path in files) for name in PLACEHOLDERS)
    blocks = BLOCKS.findall((ROOT / "docs/clusters.md").read_text())
    replacing = [line for block in blocks for line in block.splitlines() if line.startswith("sed -i ")]
    stubs = ["aws() { echo 123456789012; }", "curl() { echo 203.0.113.7; }", "cat() { echo ssh-ed25519 A/b+c ubuntu; }"]
    variables = ["group=sg-1", "subnet=subnet-1", "project=my-project"]
    subprocess.run(["bash", "-euc", "\n".join([*stubs, *variables, *replacing])], cwd=tmp_path, check=True)
    left = [(path.name, name) for path in files for name in PLACEHOLDERS if name in contents(path)]
    assert left == []


def contents(path: Path) -> str:
    """Return a YAML or JSON file without its comments, which may name placeholders."""
    return json.dumps(list(yaml.safe_load_all(path.read_text())))
