"""cluster/gcp.yaml and cluster/gcp/*.yaml: what the nodes may do, which network they use, and whose keys they hold."""

import re
import subprocess
from typing import Any

import pytest

from tests.support.cluster.manifests import ROOT, load

CONFIG = "cluster/gcp.yaml"
OWN_FILE = "~/.aws/bam-credentials"
# Each of them lets its holder take the rights of a service account, of another machine or of the project
ESCALATING = re.compile(
    r"\*|setIamPolicy|actAs|getAccessToken|signBlob|signJwt|implicitDelegation|serviceAccountKeys|roles\."
    r"|setCommonInstanceMetadata|setServiceAccount|osLogin|osAdminLogin|firewalls|startupScript|storage\."
)


def nodes() -> dict[str, Any]:
    return {name: kind["node_config"] for name, kind in load(CONFIG)["available_node_types"].items()}


def test_the_role_of_the_head_grants_no_more_rights() -> None:
    granted = load("cluster/gcp/head-role.yaml")["includedPermissions"]
    assert granted and [name for name in granted if ESCALATING.search(name)] == []
    assert {name.rpartition(".")[0] for name in granted} == {
        "compute.disks",
        "compute.instances",
        "compute.resourcePolicies",
        "compute.subnetworks",
        "compute.zoneOperations",
    }
    for known in ("iam.serviceAccounts.actAs", "compute.projects.setCommonInstanceMetadata", "compute.*"):
        assert ESCALATING.search(known)


def test_the_condition_names_the_instances_of_the_cluster() -> None:
    expression = load("cluster/gcp/condition.yaml")["expression"]
    other_types, _, named = expression.partition(" || ")
    assert other_types == 'resource.type != "compute.googleapis.com/Instance"'
    provider = load(CONFIG)["provider"]
    prefix = f"projects/{provider['project_id']}/zones/{provider['availability_zone']}/instances/"
    assert named == f'resource.name.startsWith("{prefix}ray-{load(CONFIG)["cluster_name"]}-")'


def test_workers_have_no_account_and_the_head_its_own() -> None:
    configs = nodes()
    (account,) = configs.pop("head")["serviceAccounts"]
    assert account == {
        "email": "bam-head@PROJECT_ID.iam.gserviceaccount.com",
        "scopes": ["https://www.googleapis.com/auth/compute"],
    }
    assert {name: config["serviceAccounts"] for name, config in configs.items()} == {
        "spot-a100": [],
        "spot-l4": [],
        "mix-a100": [],
    }


def test_the_key_of_the_head_opens_only_the_nodes() -> None:
    assert load(CONFIG)["auth"] == {"ssh_user": "ubuntu", "ssh_private_key": "~/.ssh/bam-gcp"}
    for config in nodes().values():
        items = {item["key"]: item["value"] for item in config["metadata"]["items"]}
        assert items == {"ssh-keys": "ubuntu:SSH_PUBLIC_KEY", "block-project-ssh-keys": "true"}


def test_every_node_is_in_the_closed_network() -> None:
    provider = load(CONFIG)["provider"]
    subnetwork = f"projects/{provider['project_id']}/regions/{provider['region']}/subnetworks/bam"
    for config in nodes().values():
        assert [interface["subnetwork"] for interface in config["networkInterfaces"]] == [subnetwork]
    guide = (ROOT / "docs/clusters.md").read_text().replace("\\\n", " ")
    rules = re.findall(r"gcloud compute firewall-rules create (\S+) +(.*)", guide)
    (subnet,) = re.findall(r"networks subnets create bam .*--range=(\S+)", guide)
    sources = {name: re.findall(r"--source-ranges=(\S+)", options) for name, options in rules}
    assert sources == {"bam-nodes": [subnet], "bam-ssh": ["YOUR_ADDRESS/32"]}
    assert dict(rules)["bam-ssh"].split()[1] == "--allow=tcp:22"
    assert all("--network=bam" in options.split() for _, options in rules)


def test_only_the_keys_of_the_store_reach_the_nodes() -> None:
    mounts = load(CONFIG)["file_mounts"]
    from_home = {source for source in mounts.values() if source.startswith(("~", "/"))}
    assert from_home == {"~/.ray/auth_token", OWN_FILE}
    assert mounts[OWN_FILE] == OWN_FILE
    assert any(OWN_FILE in command for command in load(CONFIG)["setup_commands"] if command.startswith("chmod 600 "))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("cluster/aws.yaml", {"AWS_METADATA_SERVICE_NUM_ATTEMPTS": "5", "AWS_METADATA_SERVICE_TIMEOUT": "5"}),
        (CONFIG, {"AWS_SHARED_CREDENTIALS_FILE": "/home/x/.aws/bam-credentials", "AWS_EC2_METADATA_DISABLED": "true"}),
    ],
)
@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_starts_with_the_settings_of_the_s3_client(path: str, expected: dict[str, str], commands: str) -> None:
    starting = load(path)[commands][1]
    before, _, _ = starting.partition("ray start")
    output = subprocess.run(
        ["bash", "-c", f"{before.replace('ulimit -n 65536;', '')} /usr/bin/env"],
        env={"HOME": "/home/x", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    variables = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    aws = {name: value for name, value in variables.items() if name.startswith("AWS_")}
    assert aws == expected
    assert variables["RAY_AUTH_MODE"] == "token"
