"""Workers on a node with two GPUs use as many as they requested, and process groups follow them.

The test tells Ray that the node has two GPUs, although it has none. The workers only report their environment.
"""

import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.leases import AttemptNumber
from bam_ray.control.observations import Alive, AttemptStatus, Done, Queued, Stopped
from bam_ray.control.transitions import PlacedTask
from bam_ray.errors import Interrupted
from bam_ray.on_ray.launcher import RayLauncher
from bam_ray.on_ray.work import StageFunctions
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import Recipe, parse_recipe
from bam_ray.stages.task_run import TaskRun
from tests.support.cluster.ray_cluster import ray_cluster
from tests.support.cluster.stub_stages import RECIPE, stub_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
VARIABLES = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", ALLOCATOR)


@pytest.fixture(scope="module")
def gpu_cluster() -> Iterator[Cluster]:
    """Start a cluster of one node that claims two GPUs, whose processes inherit the visibility of both."""
    with ray_cluster(nodes=0) as running:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
            patch.delenv("DS_ACCELERATOR", raising=False)
            running.add_node(num_cpus=4, num_gpus=2, object_store_memory=100 << 20)
        yield running


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    plain = RECIPE.replace("STORE", str(tmp_path / "store"))
    overrides = ["branch.overrides.code={needs: {cpus: 1, gpus: 1}}", "branch.overrides.law={needs: {cpus: 1}}"]
    return parse_recipe(plain, "test", overrides)


def record_environment(run: TaskRun, name: str | None = None) -> None:
    """Store what a worker sees of the node's devices."""
    seen: dict[str, Any] = {variable: os.environ.get(variable) for variable in VARIABLES}
    seen["visible to torch"] = torch.cuda.is_available()
    run.store.put(f"seen/{name or run.task.name}", json.dumps(seen).encode())


def record_rank(run: TaskRun, engine_factory: Any) -> None:
    """Store what a rank sees, and the backend of its process group."""
    record_environment(run, f"rank {run.rank}")
    run.store.put(f"seen/backend {run.rank}", json.dumps(dist.get_backend()).encode())


def stop_late(run: TaskRun, engine_factory: Any) -> None:
    """Stop cleanly: rank 0 seconds after the time that a collective may take."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    time.sleep(5.0 if run.rank == 0 else 0.0)
    raise Interrupted("stopped")


FUNCTIONS = StageFunctions(record_environment, record_rank)


def finish(recipe: Recipe, names: list[str], functions: StageFunctions = FUNCTIONS) -> dict[str, AttemptStatus]:
    """Run one attempt at each of the tasks `kind/name`, and return how they ended."""
    run = PipelineRun.of(recipe, FolderStore(recipe.store.uri))
    tasks = {task.full_name: task for task in run.tasks if task.full_name in names}
    launcher = RayLauncher(run, stub_engine, functions)
    try:
        for task in tasks.values():
            launcher.place(PlacedTask(task, AttemptNumber(1, 1), ("", "")), frozenset())
        until = time.monotonic() + 120
        while any(isinstance(status, Alive | Queued) for status in launcher.poll().values()):
            assert time.monotonic() < until, launcher.poll()
        ended = launcher.poll()
    finally:
        launcher.close()
    return {name: ended[task.id] for name, task in tasks.items()}


def seen(recipe: Recipe, name: str) -> Any:
    return json.loads(FolderStore(recipe.store.uri).get(f"seen/{name}"))


def test_a_task_sees_the_gpus_that_it_requested(gpu_cluster: Cluster, recipe: Recipe) -> None:
    ended = finish(recipe, ["branches/code", "branches/law"])
    assert all(isinstance(status, Done) for status in ended.values()), ended
    with_gpu, without = seen(recipe, "code"), seen(recipe, "law")
    assert with_gpu["CUDA_VISIBLE_DEVICES"] in ("0", "1")
    assert with_gpu["DS_ACCELERATOR"] == "cuda"
    assert with_gpu[ALLOCATOR] == "expandable_segments:True"
    assert without == {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", ALLOCATOR: None, "visible to torch": False}


def test_ranks_that_requested_no_gpu_see_none(gpu_cluster: Cluster, recipe: Recipe) -> None:
    ended = finish(recipe, ["mixtures/bam"])
    assert all(isinstance(status, Done) for status in ended.values()), ended
    for rank in range(2):
        found = seen(recipe, f"rank {rank}")
        assert (found["CUDA_VISIBLE_DEVICES"], found["DS_ACCELERATOR"], found["visible to torch"]) == ("", "cpu", False)
        assert seen(recipe, f"backend {rank}") == "gloo"


def test_ranks_wait_for_rank_0_longer_than_a_collective(gpu_cluster: Cluster, recipe: Recipe) -> None:
    ended = finish(recipe, ["mixtures/bam"], StageFunctions(run_rank=stop_late))
    assert isinstance(ended["mixtures/bam"], Stopped), ended
