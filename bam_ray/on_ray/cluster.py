"""What the cluster has, as Ray tells it."""

from collections.abc import Mapping

import ray
from ray._private.state import available_resources_per_node, state

from bam_ray.scheduling.nodes import NodeFacts


def living_nodes() -> list[NodeFacts]:
    """The nodes that are alive now, with what they have in all, and whether a notice says that they will be taken away:
    a spot machine's, say, which reaches Ray as a request to drain the node."""
    leaving = state.get_draining_nodes()  # by id; Ray has no public word for them
    return [
        NodeFacts(
            node["NodeID"],
            node["NodeName"],
            node["NodeManagerAddress"],
            node["Resources"],
            node["Labels"],
            leaving=node["NodeID"] in leaving,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """What is free on each node, by its id; it may be a second old."""
    free: dict[str, dict[str, float]] = available_resources_per_node()
    return free
