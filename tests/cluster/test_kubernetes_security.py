"""The KubeRay manifests: rights of the containers, tokens of Kubernetes, resource limits, and who may connect."""

import re
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.node_provider import IN_CLUSTER_CA_CERT_PATH, IN_CLUSTER_TOKEN_PATH

from tests.support.cluster.manifests import ROOT, errors, ingress_validator, load_manifest

PATHS = {kind: f"cluster/kuberay/{kind.lower()}.yaml" for kind in ("RayCluster", "RayJob", "RayService")}
CLUSTER_OF = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
DASHBOARD, ENDPOINT, GCS = 8265, 8000, 6379

every_kind = pytest.mark.parametrize("kind", PATHS)


def cluster_of(kind: str) -> Any:
    spec = load_manifest(PATHS[kind], kind)["spec"]
    return spec[CLUSTER_OF[kind]] if kind in CLUSTER_OF else spec


def templates(kind: str) -> dict[str, Any]:
    """Return the templates of all pods: the head, the groups of workers, and the pod that submits a job."""
    cluster = cluster_of(kind)
    found = {"head": cluster["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    submitter = load_manifest(PATHS[kind], kind)["spec"].get("submitterPodTemplate")
    return found | ({"submitter": submitter} if submitter else {})


def containers(kind: str) -> list[tuple[Any, Any]]:
    """Return all containers with the specifications of their pods, including the autoscaler's in the head pod."""
    found = [(each, pod["spec"]) for pod in templates(kind).values() for each in pod["spec"]["containers"]]
    return [*found, (cluster_of(kind)["autoscalerOptions"], templates(kind)["head"]["spec"])]


def violations(container: Any, pod: Any) -> list[str]:
    """Return what the Pod Security Standard `restricted` would reject."""
    settings = pod.get("securityContext", {}) | container.get("securityContext", {})
    capabilities = settings.get("capabilities", {})
    checks = {
        "runAsNonRoot": settings.get("runAsNonRoot") is True and settings.get("runAsUser", 0) > 0,
        "allowPrivilegeEscalation": settings.get("allowPrivilegeEscalation") is False,
        "capabilities": capabilities.get("drop") == ["ALL"] and not capabilities.get("add"),
        "seccompProfile": settings.get("seccompProfile", {}).get("type") == "RuntimeDefault",
        "privileged": not settings.get("privileged"),
        "host": not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")),
        "volumes": all({"emptyDir", "projected"} & set(volume) for volume in pod.get("volumes", [])),
    }
    return [name for name, holds in checks.items() if not holds]


@every_kind
def test_every_container_meets_the_restricted_standard(kind: str) -> None:
    assert [(each.get("name"), violations(each, pod)) for each, pod in containers(kind) if violations(each, pod)] == []
    container, pod = containers(kind)[0]
    assert violations(container | {"securityContext": {"privileged": True}}, pod) == [
        "allowPrivilegeEscalation",
        "capabilities",
        "privileged",
    ]
    assert violations(container, {}) == ["runAsNonRoot", "seccompProfile"]


@every_kind
def test_the_user_is_the_user_of_the_image(kind: str) -> None:
    (user,) = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "cluster/Containerfile").read_text(), re.MULTILINE)
    for template in templates(kind).values():
        settings = template["spec"]["securityContext"]
        assert (str(settings["runAsUser"]), str(settings["runAsGroup"])) == user
        assert settings["fsGroup"] == settings["runAsGroup"]  # the files of projected volumes are readable


@every_kind
def test_only_the_autoscaler_has_a_token_of_kubernetes(kind: str) -> None:
    assert {template["spec"]["automountServiceAccountToken"] for template in templates(kind).values()} == {False}
    (mount,) = cluster_of(kind)["autoscalerOptions"]["volumeMounts"]
    files = set()
    for name, template in templates(kind).items():
        for volume in template["spec"].get("volumes", []):
            sources = volume.get("projected", {}).get("sources", [])
            if any("serviceAccountToken" in source for source in sources):
                assert (name, volume["name"]) == ("head", mount["name"])
                items = [item for source in sources for each in source.values() for item in each.get("items", [each])]
                files = {item["path"] for item in items}
        for container in template["spec"]["containers"]:
            assert mount["name"] not in [each["name"] for each in container.get("volumeMounts", [])]
    needed = {PurePosixPath(path) for path in (IN_CLUSTER_TOKEN_PATH, IN_CLUSTER_CA_CERT_PATH)}
    assert needed <= {PurePosixPath(mount["mountPath"]) / name for name in files}


@every_kind
def test_every_container_has_limits(kind: str) -> None:
    for container, _ in containers(kind):
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])


def policy(kind: str) -> Any:
    return load_manifest(PATHS[kind], "NetworkPolicy")["spec"]


def matches(selector: Any, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def admitted(kind: str, labels: dict[str, str], port: int, namespace: str = "") -> bool:
    """Return True if a pod may connect to the port of a Ray pod; `namespace` names another one than the Ray pods'."""
    for rule in policy(kind)["ingress"]:
        if port not in [each["port"] for each in rule.get("ports", [{"port": port}])]:
            continue
        for peer in rule["from"]:
            other = peer.get("namespaceSelector")
            known = {"kubernetes.io/metadata.name": namespace}
            if (matches(other, known) if other else not namespace) and matches(peer["podSelector"], labels):
                return True
    return False


@every_kind
def test_a_network_policy_selects_every_pod(kind: str) -> None:
    rules = policy(kind)
    assert set(rules) == {"podSelector", "policyTypes", "ingress"}
    assert rules["policyTypes"] == ["Ingress"]
    assert errors(ingress_validator(), rules["ingress"]) == []
    assert errors(ingress_validator(), [{"form": []}]) != []
    assert rules["podSelector"] != {}
    for template in templates(kind).values():
        assert matches(rules["podSelector"], template["metadata"]["labels"])
    names = [load_manifest(path, "NetworkPolicy")["metadata"]["name"] for path in PATHS.values()]
    assert len(set(names)) == 3
    documents = list(yaml.safe_load_all((ROOT / PATHS[kind]).read_text()))
    assert documents[0]["kind"] == "NetworkPolicy"  # it exists before the first pod


@every_kind
def test_only_pods_of_the_cluster_and_the_operator_connect(kind: str) -> None:
    own = templates(kind)["head"]["metadata"]["labels"]
    operator = {"app.kubernetes.io/component": "kuberay-operator"}
    for port in (DASHBOARD, ENDPOINT, GCS, 10001, 52365):
        assert admitted(kind, own, port)
        assert not admitted(kind, own, port, "another-namespace")
        assert not admitted(kind, {"app": "a-stranger"}, port)
        assert not admitted(kind, operator, port, "another-namespace")
        assert not admitted(kind, {}, port, "kuberay-operator")
    opened = {port for port in (DASHBOARD, ENDPOINT, GCS) if admitted(kind, operator, port, "kuberay-operator")}
    assert opened == {"RayCluster": set(), "RayJob": {DASHBOARD}, "RayService": {DASHBOARD, ENDPOINT}}[kind]
    if cluster_of(kind)["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0":
        assert DASHBOARD in opened  # the only reason to listen on the network


@every_kind
def test_only_labelled_clients_reach_the_endpoint(kind: str) -> None:
    client = {"bam-serve-client": "true"}
    opened = {port for port in (DASHBOARD, ENDPOINT, GCS, 10001) if admitted(kind, client, port)}
    assert opened == ({ENDPOINT} if kind == "RayService" else set())
    assert not admitted(kind, client, ENDPOINT, "another-namespace")
