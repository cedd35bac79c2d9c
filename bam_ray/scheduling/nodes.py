"""What nodes have, and whether a demand can ever be met by them.

Ray lets a demand that no node can meet wait for ever, without a word. So it is checked here first, and said.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from bam_ray.errors import PlacementError
from bam_ray.pipeline.tasks import Task
from bam_ray.settings import Demand, Needs

NODE_ID = "ray.io/node-id"  # a label that Ray gives every node
ACCELERATOR = "ray.io/accelerator-type"  # and this to nodes with an accelerator
HEAD = "node:__internal_head__"  # a resource that Ray gives the head
RAYS_OWN = "ray.io/"  # labels that begin so tell single nodes or places apart, not kinds
GIB = 1 << 30
MANY = 1 << 30


@dataclass(frozen=True)
class NodeFacts:
    """A living node: everything it has, and what of it is free now. Memory in bytes."""

    id: str
    name: str  # as it was started with, else its address
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    free: Mapping[str, float] = field(default_factory=dict)
    leaving: bool = False  # it will soon be taken away: nothing more is placed there

    @cached_property
    def kind(self) -> str:
        """What it has in common with nodes of the same speed: `8 A100`, `4 CPU, bam/kind=large`."""
        gpus = self.resources.get("GPU", 0.0)
        what = f"{gpus:g} {self.labels.get(ACCELERATOR, 'GPU')}" if gpus else f"{self.resources.get('CPU', 0.0):g} CPU"
        own = sorted(f"{key}={value}" for key, value in self.labels.items() if not key.startswith(RAYS_OWN))
        return ", ".join([what, *own])

    @property
    def is_head(self) -> bool:
        """Whether it is the node that the others join."""
        return HEAD in self.resources


def resources_of(demand: Demand) -> dict[str, float]:
    """`demand` in Ray's words; memory in bytes."""
    wanted = {"CPU": demand.cpus, "GPU": demand.gpus, "memory": float(int(demand.memory_gib * GIB))}
    return {name: amount for name, amount in wanted.items() if amount > 0}


def fits(wanted: Mapping[str, float], there: Mapping[str, float], most: int = MANY) -> int:
    """How many times `wanted` goes into `there`; at most `most`, which is the answer where nothing is wanted."""
    for name, amount in wanted.items():
        most = min(most, int((there.get(name, 0.0) + 1e-6) / amount))
    return most


def room(demand: Demand, nodes: Iterable[NodeFacts], most: int = MANY) -> int:
    """How many workers with `demand`, counted up to `most`, would fit on `nodes` if these were idle."""
    wanted = resources_of(demand)
    count = 0
    for node in nodes:
        if count >= most:
            break
        if selects(demand.labels, node.labels):
            count += fits(wanted, node.resources, most)
    return min(count, most)


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with `labels` meets a label selector: `value`, `!value`, `in(a,b)` or `!in(a,b)` for each key."""
    for key, condition in selector.items():
        wanted = condition.removeprefix("!")
        values = {value.strip() for value in wanted.removeprefix("in(").removesuffix(")").split(",")}
        if (labels.get(key) in values) == condition.startswith("!"):
            return False
    return True


def demand_met(task: Task, nodes: Sequence[NodeFacts]) -> tuple[Demand, str]:
    """The first of a task's demands that `nodes` could ever meet, and what to say of it (nothing, of the first).

    Raises `PlacementError` where they can meet none.
    """
    demands = [task.needs, *task.needs.fallback]
    for place, demand in enumerate(demands):
        if room(demand, nodes, task.workers) >= task.workers:
            said = f"no node can give {said_of(task.needs)}: took fallback {place}, {said_of(demand)}" if place else ""
            return demand, said
    asked = " or ".join(_with_workers(task, demand) for demand in demands)
    raise PlacementError(
        f"{task.where} needs {asked}, which the {len(nodes)} living nodes can never give "
        f"({said_of_nodes(nodes)}): mend {task.kind.setting} or add nodes"
    )


def selector_of(task: Task, avoid: frozenset[str], nodes: Sequence[NodeFacts]) -> dict[str, str]:
    """The label selector to place `task` with: off the nodes `avoid`, where others can hold it."""
    shunned = sorted(avoid & {node.id for node in nodes})
    others = [node for node in nodes if node.id not in avoid]
    if not shunned or room(task.needs, others, task.workers) < task.workers:
        return dict(task.needs.labels)
    return {**task.needs.labels, NODE_ID: f"!in({','.join(shunned)})"}


def as_needs(demand: Demand) -> Needs:
    """`demand` as needs without a fallback."""
    return Needs(cpus=demand.cpus, gpus=demand.gpus, memory_gib=demand.memory_gib, labels=demand.labels)


def said_of(demand: Demand) -> str:
    """For people: `1 CPU, 2 GPU, 80 GiB, labels kind=A`."""
    parts = [f"{demand.cpus:g} CPU"]
    if demand.gpus:
        parts.append(f"{demand.gpus:g} GPU")
    if demand.memory_gib:
        parts.append(f"{demand.memory_gib:g} GiB")
    if demand.labels:
        parts.append("labels " + ", ".join(f"{key}={value}" for key, value in demand.labels.items()))
    return ", ".join(parts)


def said_of_nodes(nodes: Sequence[NodeFacts]) -> str:
    """For people: `3 × 2 CPU, 1 × 8 A100`."""
    return "; ".join(f"{count} × {kind}" for kind, count in Counter(node.kind for node in nodes).most_common())


def _with_workers(task: Task, demand: Demand) -> str:
    return f"{task.workers} × ({said_of(demand)})" if task.workers > 1 else said_of(demand)
