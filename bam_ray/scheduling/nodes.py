"""The living nodes, and the resource requests that they can satisfy.

Ray keeps a request pending forever if no node can satisfy it, and reports no error. Requests are therefore checked here
before they are placed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from bam_ray.errors import PlacementError
from bam_ray.pipeline.tasks import Task
from bam_ray.settings import Demand, Needs
from bam_ray.units import GIB

NODE_ID = "ray.io/node-id"  # label that Ray gives to every node
ACCELERATOR = "ray.io/accelerator-type"  # label that Ray gives to nodes with an accelerator
HEAD = "node:__internal_head__"  # resource that Ray gives to the head node alone
RAY_LABEL_PREFIX = "ray.io/"  # labels with this prefix identify a node or its location, not the kind of node
UNLIMITED = 1 << 30  # a number of workers that no cluster reaches
ROUNDING = 1e-6  # tolerance for resource amounts that Ray has rounded


@dataclass(frozen=True)
class NodeFacts:
    """A living node: all of its resources, and the resources that are free now. Memory is in bytes."""

    id: str
    name: str  # the name that the node was started with, or its address
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    free: Mapping[str, float] = field(default_factory=dict)
    leaving: bool = False  # the node will be taken away soon, so nothing more is placed on it

    @cached_property
    def kind(self) -> str:
        """The description that nodes of equal speed share: `8 A100`, `4 CPU, bam/kind=large`."""
        gpus = self.resources.get("GPU", 0.0)
        compute = (
            f"{gpus:g} {self.labels.get(ACCELERATOR, 'GPU')}" if gpus else f"{self.resources.get('CPU', 0.0):g} CPU"
        )
        labels = sorted(f"{key}={value}" for key, value in self.labels.items() if not key.startswith(RAY_LABEL_PREFIX))
        return ", ".join([compute, *labels])

    @property
    def is_head(self) -> bool:
        """True if this is the head node, which the other nodes join."""
        return HEAD in self.resources


def ray_resources(demand: Demand) -> dict[str, float]:
    """Return `demand` as Ray's resources, without zeros; memory is in bytes."""
    wanted = {"CPU": demand.cpus, "GPU": demand.gpus, "memory": float(int((demand.memory_gib or 0.0) * GIB))}
    return {name: amount for name, amount in wanted.items() if amount > 0}


def count_fitting(wanted: Mapping[str, float], available: Mapping[str, float], limit: int = UNLIMITED) -> int:
    """Return how many times `wanted` fits into `available`, but at most `limit`; `limit` if nothing is wanted."""
    for name, amount in wanted.items():
        limit = min(limit, int((available.get(name, 0.0) + ROUNDING) / amount))
    return limit


def worker_capacity(demand: Demand, nodes: Iterable[NodeFacts], limit: int = UNLIMITED) -> int:
    """Return how many workers with `demand` would fit on `nodes` if these were idle, but at most `limit`."""
    wanted = ray_resources(demand)
    count = 0
    for node in nodes:
        if count >= limit:
            break
        if selects(demand.labels, node.labels):
            count += count_fitting(wanted, node.resources, limit)
    return min(count, limit)


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return True if a node with `labels` matches a label selector.

    Args:
        selector: The condition for each key: `value`, `!value`, `in(a,b)` or `!in(a,b)`.
        labels: The labels of the node.
    """
    for key, condition in selector.items():
        wanted = condition.removeprefix("!")
        values = {value.strip() for value in wanted.removeprefix("in(").removesuffix(")").split(",")}
        if (labels.get(key) in values) == condition.startswith("!"):
            return False
    return True


def satisfiable_request(task: Task, nodes: Sequence[NodeFacts]) -> tuple[Demand, str]:
    """Return the first resource request of `task` that `nodes` could satisfy for all of its workers if they were idle.

    Returns:
        The request, and a message that says which fallback it is (empty for the first choice).

    Raises:
        PlacementError: The nodes can satisfy none of the requests.
    """
    demands = [task.needs, *task.needs.fallback]
    for number, demand in enumerate(demands):
        if worker_capacity(demand, nodes, task.workers) >= task.workers:
            message = (
                f"no node can satisfy {describe_request(task.needs)}: using fallback {number}, "
                f"{describe_request(demand)}"
            )
            return demand, message if number else ""
    requests = " or ".join(_describe_workers(task, demand) for demand in demands)
    raise PlacementError(
        f"{'no node' if task.workers == 1 else 'no set of nodes'} can satisfy {task.full_name} ({requests}); "
        f"the cluster has {len(nodes)} living node{'' if len(nodes) == 1 else 's'} ({describe_nodes(nodes)}): "
        f"{_memory_shortage(task, demands, nodes)}change {task.kind.setting} or add nodes"
    )


def _memory_shortage(task: Task, demands: Sequence[Demand], nodes: Sequence[NodeFacts]) -> str:
    """Return how much memory is missing and what reduces it; empty if it is not the memory that the nodes lack."""
    without = [demand.model_copy(update={"memory_gib": 0.0}) for demand in demands]
    if not any(worker_capacity(demand, nodes, task.workers) >= task.workers for demand in without):
        return ""
    least = min(demand.memory_gib or 0.0 for demand in demands)
    sizes = sorted((node.resources.get("memory", 0.0) / GIB for node in nodes), reverse=True)
    available = " + ".join(f"{size:.1f}" for size in sizes[: max(task.workers, 1)])
    smaller = "use a smaller micro_batch_sequences or recompute, " if task.kind.trains else ""
    needed = f"{task.workers} × {least:g}" if task.workers > 1 else f"{least:g}"
    return (
        f"{needed} GiB of memory are needed, and the largest node{'s have' if task.workers > 1 else ' has'} "
        f"{available} GiB; {smaller}"
    )


def label_selector(task: Task, avoid: frozenset[str], nodes: Sequence[NodeFacts]) -> dict[str, str]:
    """Return the label selector that places `task`; it excludes the nodes `avoid` if the other nodes are enough."""
    avoided = sorted(avoid & {node.id for node in nodes})
    others = [node for node in nodes if node.id not in avoid]
    if not avoided or worker_capacity(task.needs, others, task.workers) < task.workers:
        return dict(task.needs.labels)
    return {**task.needs.labels, NODE_ID: f"!in({','.join(avoided)})"}


def without_fallbacks(demand: Demand) -> Needs:
    """Return `demand` as the needs of a task that have no fallback."""
    return Needs(cpus=demand.cpus, gpus=demand.gpus, memory_gib=demand.memory_gib, labels=demand.labels)


def describe_request(demand: Demand) -> str:
    """Format a resource request for messages: `1 CPU, 2 GPU, 80 GiB, labels kind=A`."""
    parts = [f"{demand.cpus:g} CPU"]
    if demand.gpus:
        parts.append(f"{demand.gpus:g} GPU")
    if demand.memory_gib:
        parts.append(f"{demand.memory_gib:g} GiB")
    if demand.labels:
        parts.append("labels " + ", ".join(f"{key}={value}" for key, value in demand.labels.items()))
    return ", ".join(parts)


def describe_nodes(nodes: Sequence[NodeFacts]) -> str:
    """Format the kinds of `nodes` for messages, most frequent first: `3 × 2 CPU; 1 × 8 A100`."""
    return "; ".join(f"{count} × {kind}" for kind, count in Counter(node.kind for node in nodes).most_common())


def _describe_workers(task: Task, demand: Demand) -> str:
    return f"{task.workers} × ({describe_request(demand)})" if task.workers > 1 else describe_request(demand)
