"""The simulated makespan over a lower bound, compared with a static split and a barrier.

    python -m benchmarks.scheduling

bound     max(all work / all speeds, the m longest branches / the m fastest nodes): no schedule is shorter
bam_ray   the real controller on the cluster file: without preemptions, and with those of the file (median of seeds)
static    each branch runs on the node that would finish it first, the longest first, and never moves
barrier   synchronous data parallelism: all nodes train every branch together, at the speed of the slowest

The static split and the barrier have no preemptions, and the barrier's communication costs nothing.
"""

import statistics
from pathlib import Path

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.pipeline.tasks import Task
from bam_ray.planning.cluster_file import ClusterFile, NodeGroup, load_cluster
from bam_ray.planning.simulate import SimulationPace, SimulationResult, simulate
from bam_ray.scheduling.matching import bound
from bam_ray.settings import Needs
from benchmarks.measure import report

CLUSTERS = Path(__file__).parents[1] / "recipes" / "clusters"
TRAINING_FLOPS = 2.5e9  # for each token: a model of about 340 million parameters
HOURS = 10.0  # the lower bound of the run
SEEDS = 3


def main() -> None:
    """Simulate, print a table and write `benchmarks/results/scheduling.json`."""
    cases: list[tuple[str, ClusterFile, int]] = [
        ("eight-mixed-nodes", load_cluster(CLUSTERS / "eight-mixed-nodes.yaml"), 12),
        ("spot-200", load_cluster(CLUSTERS / "spot-200.yaml"), 240),
        ("laptop", load_cluster(CLUSTERS / "laptop.yaml"), 6),
        ("speeds 1, 1, 1/2, 1/4", speeds(1000.0, 1000.0, 500.0, 250.0), 4),
        ("speeds 4, 2, 1", speeds(4000.0, 2000.0, 1000.0), 9),
    ]
    rows = [compare(name, cluster, branches) for name, cluster, branches in cases]
    columns = ["cluster", "branches", "bam_ray", "with preemptions", "moves a branch", "static", "barrier"]
    report("scheduling", columns, rows)


def compare(name: str, cluster: ClusterFile, branches: int) -> list[str | float]:
    """Return the row of one cluster."""
    slots = [
        speed_of(group)
        for group in cluster.nodes.values()
        for _ in range(group.count * (1 if group.gpus else int(group.cpus)))
    ]
    work = HOURS * 3600.0 * sum(slots) / branches
    at_best = bound([work] * branches, slots)
    work *= HOURS * 3600.0 / at_best
    at_best = bound([work] * branches, slots)
    step = min(slots) * 10.0  # tokens of a step, which takes ten seconds on the slowest node
    gpus = float(any(group.gpus for group in cluster.nodes.values()))
    tasks = [
        Task(
            ArtifactKind.BRANCHES,
            f"b{i}",
            f"b{i}",
            (),
            Needs(gpus=gpus),
            total_steps=round(work / step),
            model="dense",
            step_tokens=round(step),
        )
        for i in range(branches)
    ]
    steady = {kind: group.model_copy(update={"preemptions_per_hour": 0.0}) for kind, group in cluster.nodes.items()}
    calm = run(tasks, cluster.model_copy(update={"nodes": steady}), 0)
    spot = [run(tasks, cluster, seed) for seed in range(SEEDS)]
    return [
        name,
        str(branches),
        calm.seconds / at_best,
        statistics.median(each.seconds for each in spot) / at_best,
        calm.moves / branches,
        static(work, branches, slots, cluster.start_seconds + cluster.checkpoint_seconds) / at_best,
        work * branches / (len(slots) * min(slots)) / at_best,
    ]


def run(tasks: list[Task], cluster: ClusterFile, seed: int) -> SimulationResult:
    """Simulate a run of `tasks` on `cluster`."""
    every = {task.id: 30 for task in tasks}
    pace = SimulationPace(step_every=240.0, retry_delay=30.0)
    result = simulate(tasks, cluster, lambda task, group: speed_of(group), every, seed, pace)
    assert result.outcome == "finished"
    return result


def static(work: float, branches: int, slots: list[float], overhead: float) -> float:
    """Return the makespan of a split that never changes."""
    ends = [0.0] * len(slots)
    for _ in range(branches):
        soonest = min(range(len(slots)), key=lambda slot: ends[slot] + overhead + work / slots[slot])
        ends[soonest] += overhead + work / slots[soonest]
    return max(ends)


def speed_of(group: NodeGroup) -> float:
    """Return the tokens a second of a node."""
    return group.tokens_per_second or (group.tflops or 0.0) * 1e12 / TRAINING_FLOPS


def speeds(*tokens_per_second: float) -> ClusterFile:
    """Return a cluster with one node of each speed."""
    nodes = {
        f"node-{number}": {"count": 1, "cpus": 1, "labels": {"node": str(number)}, "tokens_per_second": speed}
        for number, speed in enumerate(tokens_per_second)
    }
    return ClusterFile.model_validate({"name": "speeds", "nodes": nodes})


if __name__ == "__main__":
    main()
