"""The time of one step of the controller, at 1,000 branches on 300 simulated nodes.

    python -m benchmarks.controller_step

200 steps are timed, about half of a run. Each includes the launcher's answers (nodes and attempts), throughput
measurement, matching and placement. The launcher is simulated, so the time that Ray needs to answer is not included.
The times are CPU times of one thread.
"""

import gc
import statistics
import time

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.controller import Controller
from bam_ray.pipeline.states import Running
from bam_ray.pipeline.tasks import Task
from bam_ray.planning.cluster_file import ClusterFile
from bam_ray.planning.simulated_launcher import SimulatedLauncher
from bam_ray.settings import Needs
from benchmarks.measure import report

BRANCHES, LOOKS, LOOK_EVERY = 1000, 200, 120.0
NODES = {
    "fast": {"count": 60, "labels": {"speed": "fast"}, "tokens_per_second": 4000},
    "middle": {"count": 90, "labels": {"speed": "middle"}, "tokens_per_second": 2000},
    "slow": {"count": 150, "labels": {"speed": "slow"}, "tokens_per_second": 1000, "preemptions_per_hour": 0.1},
}


def main() -> None:
    """Measure, print a table and write `benchmarks/results/controller_step.json`."""
    cluster = ClusterFile.model_validate({"name": "three-hundred", "nodes": NODES, "start_seconds": 60})
    needs = Needs(cpus=8)
    tasks = [
        Task(
            ArtifactKind.BRANCHES,
            f"b{i}",
            f"b{i}",
            (),
            needs,
            total_steps=5000 + 5 * i,
            model="dense",
            step_tokens=4000,
        )
        for i in range(BRANCHES)
    ]
    store = MemoryStore()
    launcher = SimulatedLauncher(
        cluster, store, lambda task, group: group.tokens_per_second, {task.id: 100 for task in tasks}, seed=0
    )
    controller = Controller(tasks, store, launcher, clock=lambda: launcher.now)
    gc.freeze()  # a driver does not have the modules that `measure` imports, such as torch
    taken: list[float] = []
    for _ in range(LOOKS):
        start = time.process_time()
        controller.step()
        taken.append(1000 * (time.process_time() - start))
        launcher.advance(launcher.now + LOOK_EVERY)
    running = sum(isinstance(state, Running) for state in controller.states.values())
    taken.sort()
    row: list[str | float] = [
        "1,000 branches, 300 nodes",
        str(running),
        statistics.median(taken),
        taken[int(0.99 * LOOKS)],
        50.0,
    ]
    report("controller_step", ["what", "running at the end", "median ms", "99th of 100 ms", "target ms"], [row])


if __name__ == "__main__":
    main()
