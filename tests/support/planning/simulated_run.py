"""Simulated runs on clusters of nodes with given speeds."""

from bam_ray.pipeline.tasks import Task
from bam_ray.planning.cluster_file import ClusterFile
from bam_ray.planning.simulate import SimulationResult, simulate


def make_cluster(nodes: dict[str, tuple[int, float]], preemptions_per_hour: float = 0.0) -> ClusterFile:
    """Return a cluster file; `nodes` maps the name of a node group to (number of nodes, tokens per second)."""
    groups = {
        kind: {
            "count": count,
            "cpus": 1,
            "labels": {"speed": kind},
            "tokens_per_second": speed,
            "preemptions_per_hour": preemptions_per_hour,
        }
        for kind, (count, speed) in nodes.items()
    }
    return ClusterFile.model_validate({"name": "test", "nodes": groups, "start_seconds": 30, "checkpoint_seconds": 15})


def simulate_tasks(tasks: list[Task], cluster: ClusterFile, seed: int = 0) -> SimulationResult:
    """Simulate `tasks` on `cluster`, with a checkpoint of every task each 100 steps."""
    every = {task.id: 100 for task in tasks}
    return simulate(tasks, cluster, lambda task, group: group.tokens_per_second, every, seed)
