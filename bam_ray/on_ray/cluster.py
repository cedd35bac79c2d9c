"""What the cluster has, and whether a task's demand can ever be met by it.

Ray lets a demand that no node can meet wait for ever, without a word. So it is checked here first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import ray

from bam_ray.checkpoint.manifest import Kind
from bam_ray.control.tasks import Task
from bam_ray.errors import PlacementError
from bam_ray.settings import Needs

NODE_ID = "ray.io/node-id"  # a label that Ray gives every node
GIB = 1 << 30
SETTING: dict[Kind, str] = {
    "corpora": "the recipe",
    "seeds": "seed.needs",
    "branches": "branch.needs",
    "upcycled": "upcycle.needs",
    "mixtures": "mix.needs",
    "evaluations": "evaluate.needs",
    "reports": "evaluate.needs",
}


@dataclass(frozen=True)
class NodeFacts:
    """A living node: everything it has, used or not."""

    id: str
    name: str  # as it was started with, else its address
    address: str
    resources: dict[str, float]
    labels: dict[str, str]


def living_nodes() -> list[NodeFacts]:
    """The nodes that are alive now."""
    return [
        NodeFacts(node["NodeID"], node["NodeName"], node["NodeManagerAddress"], node["Resources"], node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def resources_of(needs: Needs) -> dict[str, float]:
    """`needs` in Ray's words; memory in bytes."""
    wanted = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": float(int(needs.memory_gib * GIB))}
    return {name: amount for name, amount in wanted.items() if amount > 0}


def selector_for(task: Task, avoid: frozenset[str], nodes: Sequence[NodeFacts]) -> dict[str, str]:
    """The label selector to place `task` with: off the nodes `avoid`, where others can hold it.

    Raises `PlacementError` where none can.
    """
    if room(task, nodes) < task.workers:
        raise PlacementError(
            f"{task.kind}/{task.name} needs {_said(task)}, which the {len(nodes)} living nodes can never give: "
            f"mend {SETTING[task.kind]} or add nodes"
        )
    shunned = sorted(avoid & {node.id for node in nodes})
    others = [node for node in nodes if node.id not in avoid]
    if not shunned or room(task, others) < task.workers:
        return dict(task.needs.labels)
    return {**task.needs.labels, NODE_ID: f"!in({','.join(shunned)})"}


def room(task: Task, nodes: Sequence[NodeFacts]) -> int:
    """How many workers of `task` would fit on `nodes` if these were idle."""
    wanted = resources_of(task.needs)
    fitting = [node for node in nodes if selects(task.needs.labels, node.labels)]
    if not wanted:
        return task.workers if fitting else 0
    return sum(min(int(node.resources.get(name, 0.0) / amount) for name, amount in wanted.items()) for node in fitting)


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether a node with `labels` meets a label selector: `value`, `!value`, `in(a,b)` or `!in(a,b)` for each key."""
    for key, condition in selector.items():
        wanted = condition.removeprefix("!")
        values = {value.strip() for value in wanted.removeprefix("in(").removesuffix(")").split(",")}
        if (labels.get(key) in values) == condition.startswith("!"):
            return False
    return True


def _said(task: Task) -> str:
    needs = task.needs
    parts = [f"{needs.cpus:g} CPU"]
    if needs.gpus:
        parts.append(f"{needs.gpus:g} GPU")
    if needs.memory_gib:
        parts.append(f"{needs.memory_gib:g} GiB")
    if needs.labels:
        parts.append("labels " + ", ".join(f"{key}={value}" for key, value in needs.labels.items()))
    of_each = f"{task.workers} × ({', '.join(parts)})"
    return of_each if task.workers > 1 else ", ".join(parts)
