"""Schemas closed to names they do not know, and the nodes that a file of `cluster/` promises."""

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
from bam_ray.scheduling.nodes import NodeFacts, demand_met

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = Path(__file__).parent / "schemas"
GIB = 1 << 30


def load(path: str) -> Any:
    """A YAML file of the repository."""
    return yaml.safe_load((ROOT / path).read_text())


def crd_validator(kind: str) -> Draft202012Validator:
    """Validates a manifest of KubeRay's `kind`; what a cluster would drop silently is an error."""
    return Draft202012Validator(_closed(_read(kind.lower())))


def gce_validator() -> Draft202012Validator:
    """Validates an instance of Compute Engine, as its API takes it."""
    definitions = {name: _closed(_from_discovery(schema)) for name, schema in _read("gce-instance").items()}
    return Draft202012Validator({"$ref": "#/$defs/Instance", "$defs": definitions})


def errors(validator: Draft202012Validator, plain: Any) -> list[str]:
    """What is wrong, a line each: where, and why."""
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(plain)]


def facts(name: str, resources: dict[str, float], labels: dict[str, str]) -> NodeFacts:
    """A node as the placement check sees it."""
    return NodeFacts(name, name, "", resources, labels)


def unmet(tasks: Sequence[Task], nodes: Sequence[NodeFacts]) -> list[str]:
    """The tasks whose demand the nodes could never meet."""
    missing = []
    for task in tasks:
        try:
            demand_met(task, nodes)
        except PlacementError:
            missing.append(task.where)
    return missing


def gib(quantity: str) -> float:
    """A Kubernetes quantity such as `16Gi`."""
    match = re.fullmatch(r"(\d+)Gi", quantity)
    assert match, quantity
    return float(match[1])


def _read(name: str) -> Any:
    return json.loads(gzip.decompress((SCHEMAS / f"{name}.json.gz").read_bytes()))


def _closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` wherever an object's properties are listed."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and isinstance(schema.get("type"), str):
        closed.setdefault("additionalProperties", False)
    return closed


def _from_discovery(schema: Any) -> Any:
    """A Google discovery schema in JSON schema's words."""
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
