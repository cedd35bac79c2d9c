"""What the cluster has, as Ray tells it."""

from collections.abc import Mapping

import ray
from ray._private.state import available_resources_per_node

from bam_ray.control.nodes import NodeFacts


def living_nodes() -> list[NodeFacts]:
    """The nodes that are alive now, with what they have in all."""
    return [
        NodeFacts(node["NodeID"], node["NodeName"], node["NodeManagerAddress"], node["Resources"], node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """What is free on each node, by its id; it may be a second old."""
    free: dict[str, dict[str, float]] = available_resources_per_node()
    return free
