"""The nodes of the cluster and their free resources, as Ray reports them."""

from collections.abc import Mapping

import ray
from ray._private.state import available_resources_per_node, state

from bam_ray.scheduling.nodes import NodeFacts


def living_nodes() -> list[NodeFacts]:
    """Return the nodes that are alive, with their total resources.

    A node is `leaving` if a notice says that it will be taken away, such as a spot node's. The notice reaches Ray as a
    request to drain the node.
    """
    leaving = state.get_draining_nodes()  # by node id; Ray has no public function for this
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
    """Return the free resources of each node by node id; they may be a second old."""
    free: dict[str, dict[str, float]] = available_resources_per_node()
    return free
