"""The makespan of nine branches on a real local Ray cluster, whose nodes have the speeds 4 : 2 : 1.

    python -m benchmarks.makespan

The branches are stubs: for each step they sleep as long as the label of their node says. Everything else is real:
actors, process starts, checkpoints and the blob store. The lower bound ("floor") is the total work over the total
speed. The simulator's prediction uses the speeds and the durations of starts and checkpoints that the real run has
measured. The static split and the barrier use the same speeds. They are those of `benchmarks.scheduling`, so the
barrier's communication costs nothing.
"""

import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.control.controller import Controller
from bam_ray.errors import Interrupted
from bam_ray.on_ray.cluster import living_nodes
from bam_ray.on_ray.launcher import RayLauncher
from bam_ray.on_ray.work import StageFunctions
from bam_ray.pipeline.graph import subset
from bam_ray.pipeline.run import PipelineRun
from bam_ray.pipeline.tasks import Progress
from bam_ray.planning.cluster_file import ClusterFile
from bam_ray.planning.simulate import SimulationPace, simulate
from bam_ray.settings import Recipe, parse_recipe
from bam_ray.stages.task_run import TaskRun
from benchmarks.measure import report
from benchmarks.scheduling import static

STEP_SECONDS = {"fast": 0.1, "middle": 0.2, "slow": 0.4}
BRANCHES, STEPS, STEP_TOKENS = 9, 600, 256
RECIPE = {
    "name": "makespan",
    "data": {"domains": {name: {"source": "none"} for name in ["general", *(f"d{i}" for i in range(BRANCHES))]}},
    "seed": {"scratch": {}, "training": {"tokens": STEP_TOKENS, "batch_tokens": STEP_TOKENS, "peak_lr": 0.01}},
    "branch": {
        "domains": [f"d{i}" for i in range(BRANCHES)],
        "training": {"tokens": STEPS * STEP_TOKENS, "batch_tokens": STEP_TOKENS, "peak_lr": 0.01},
    },
    "upcycle": {"mixtures": {"bam": {"method": "bam"}}},
    "mix": {"expert_parallel": 1, "training": {"tokens": STEP_TOKENS, "batch_tokens": STEP_TOKENS, "peak_lr": 0.01}},
}


def sleeping(run: TaskRun) -> None:
    """Sleep for each step of the task; resumes at the last step after a stop."""
    here = ray.get_runtime_context().get_node_id()
    labels = next(node.labels for node in living_nodes() if node.id == here)
    task, store, context = run.task, run.store, run.context
    key = f"steps/{task.name}.json"
    first = json.loads(store.get(key)) if store.exists(key) else 0
    for step in range(first, task.total_steps):
        if context.should_stop():
            store.put(key, json.dumps(step).encode())
            raise Interrupted("stopped")
        time.sleep(STEP_SECONDS[labels["speed"]])
        context.report(Progress(step + 1, task.total_steps, checkpoint_step=first))
    run.artifact.commit(Manifest(id=task.id, kind=task.kind, name=task.name, step=task.total_steps))


def main() -> None:
    """Measure, print a table and write `benchmarks/results/makespan.json`."""
    with tempfile.TemporaryDirectory(prefix="bam-span-") as folder:
        recipe = parse_recipe(json.dumps({**RECIPE, "store": {"uri": f"{folder}/store"}}), "benchmark")
        controller, seconds = run(recipe, folder)
    tasks = [replace(task, parents=()) for task in controller.tasks.values() if task.kind == "branches"]
    group = ("dense", "1 CPU")
    rates = {kind: controller.throughput.rate(group, f"1 CPU, speed={kind}") for kind in STEP_SECONDS}
    floor = BRANCHES * STEPS / sum(1 / each for each in STEP_SECONDS.values())
    start, checkpoint = controller.throughput.start_and_checkpoint_seconds(group)
    nodes = {
        kind: {"count": 1, "cpus": 1, "labels": {"speed": kind}, "tokens_per_second": rate}
        for kind, rate in rates.items()
    }
    cluster = ClusterFile.model_validate(
        {"name": "predicted", "nodes": nodes, "start_seconds": start, "checkpoint_seconds": checkpoint}
    )
    predicted = simulate(
        tasks,
        cluster,
        lambda task, group: group.tokens_per_second,
        {task.id: 50 for task in tasks},
        pace=SimulationPace(step_every=0.5, retry_delay=0.5),
    )
    work, slots = float(STEPS * STEP_TOKENS), [rate for rate in rates.values() if rate]
    split = static(work, BRANCHES, slots, start)
    barrier = work * BRANCHES / (len(slots) * min(slots))
    moves = sum(ended.cause == "moved" for task in tasks for ended in controller.history(task.id).past_attempts)
    columns = ["what", "seconds", "over the floor"]
    rows: list[list[str | float]] = [
        ["total work / total speed", floor, 1.0],
        [f"measured, {moves} moves", seconds, seconds / floor],
        [f"predicted, {predicted.moves} moves", predicted.seconds, predicted.seconds / floor],
        ["static split, at the measured speeds", split, split / floor],
        ["barrier, at the measured speeds", barrier, barrier / floor],
        ["median start", start, start / floor],
        ["median checkpoint", checkpoint, checkpoint / floor],
    ]
    report("makespan", columns, rows)


def run(recipe: Recipe, folder: str) -> tuple[Controller, float]:
    """Run the branches; return the controller and the seconds of the run."""
    (Path(folder) / "ray").mkdir()
    os.environ |= {
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    store = FolderStore(recipe.store.uri)
    pipeline = PipelineRun.of(recipe, store)
    for task in subset(pipeline.tasks, [ArtifactKind.SEEDS]):
        Artifact(store, task.kind, task.id).commit(Manifest(id=task.id, kind=task.kind, name=task.name))
    small = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        for kind in STEP_SECONDS:
            cluster.add_node(num_cpus=1, labels={"speed": kind}, **small)
        ray.init(address=cluster.address, log_to_driver=False)
        launcher = RayLauncher(pipeline, None, StageFunctions(sleeping))
        controller = Controller(subset(pipeline.tasks, [ArtifactKind.BRANCHES]), store, launcher)
        begin = time.monotonic()
        outcome = controller.run(pause=0.2)
        seconds = time.monotonic() - begin
        assert outcome == "finished", outcome
        return controller, seconds
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
