"""Validators of the files in `cluster/` and of the nodes that they describe.

The schemas are those of the APIs, changed to reject unknown names.
"""

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from bam_ray.errors import PlacementError
from bam_ray.pipeline.tasks import Task
from bam_ray.scheduling.nodes import NodeFacts, satisfiable_request

ROOT = Path(__file__).resolve().parents[3]
SCHEMAS = ROOT / "tests/cluster/schemas"


def load(path: str) -> Any:
    """Load a YAML file of the repository."""
    return yaml.safe_load((ROOT / path).read_text())


def load_manifest(path: str, kind: str) -> Any:
    """Load the one object of a kind from a file with several Kubernetes objects."""
    (found,) = [each for each in yaml.safe_load_all((ROOT / path).read_text()) if each["kind"] == kind]
    return found


def ingress_validator() -> Draft202012Validator:
    """Return a validator of the ingress rules of a NetworkPolicy, from KubeRay's copy of that schema."""
    policy = _read("raycluster")["properties"]["spec"]["properties"]["networkPolicy"]
    return Draft202012Validator(_closed(policy["properties"]["head"]["properties"]["ingressRules"]))


def crd_validator(kind: str) -> Draft202012Validator:
    """Return a validator of manifests of KubeRay's `kind`, which rejects fields that a cluster would drop silently."""
    return Draft202012Validator(_closed(_read(kind.lower())))


def gce_validator() -> Draft202012Validator:
    """Return a validator of instances as the API of Compute Engine accepts them."""
    definitions = {name: _closed(_from_discovery(schema)) for name, schema in _read("gce-instance").items()}
    return Draft202012Validator({"$ref": "#/$defs/Instance", "$defs": definitions})


def errors(validator: Draft202012Validator, plain: Any) -> list[str]:
    """Return a line for each error, with its path and its reason."""
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(plain)]


def facts(name: str, resources: dict[str, float], labels: dict[str, str]) -> NodeFacts:
    """Return a node as the placement check sees it."""
    return NodeFacts(name, name, "", resources, labels)


def unmet(tasks: Sequence[Task], nodes: Sequence[NodeFacts]) -> list[str]:
    """Return the tasks whose resource request the nodes can never meet."""
    missing = []
    for task in tasks:
        try:
            satisfiable_request(task, nodes)
        except PlacementError:
            missing.append(task.full_name)
    return missing


def gib(quantity: str) -> float:
    """Return a Kubernetes quantity such as `16Gi` as a number of GiB."""
    match = re.fullmatch(r"(\d+)Gi", quantity)
    assert match, quantity
    return float(match[1])


def _read(name: str) -> Any:
    return json.loads(gzip.decompress((SCHEMAS / f"{name}.json.gz").read_bytes()))


def _closed(schema: Any) -> Any:
    """Return the schema with `additionalProperties: false` in every object whose properties are listed."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and isinstance(schema.get("type"), str):
        closed.setdefault("additionalProperties", False)
    return closed


def _from_discovery(schema: Any) -> Any:
    """Return a Google discovery schema as a JSON schema."""
    if isinstance(schema, list):
        return [_from_discovery(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _from_discovery(value) for key, value in schema.items()}
    if isinstance(plain.get("$ref"), str):
        plain["$ref"] = f"#/$defs/{plain['$ref']}"
    if plain.get("format") == "int64":
        plain["type"] = ["string", "integer"]
    return plain
