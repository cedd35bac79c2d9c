"""A task that takes all memory of its node is killed by Ray; the driver survives, says so in one line and goes on."""

from pathlib import Path

import psutil
import pytest

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.control.controller import Controller
from bam_ray.on_ray.launcher import RayLauncher
from bam_ray.on_ray.work import StageFunctions
from bam_ray.pipeline.graph import find_task, subset
from bam_ray.pipeline.run import PipelineRun
from bam_ray.pipeline.states import Committed
from bam_ray.settings import parse_recipe
from bam_ray.units import GIB
from tests.support.cluster.ray_cluster import ray_cluster
from tests.support.cluster.stub_stages import RECIPE, hungry_law_stage, stub_engine, stub_rank

SPARE = 4 * GIB  # above what is used now, at which Ray starts to kill


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_task_that_takes_all_memory_does_not_end_the_run(tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + SPARE) / memory.total
    recipe = parse_recipe(RECIPE.replace("STORE", str(tmp_path / "store")), "test", ["branch.domains=[law]"])
    store = FolderStore(recipe.store.uri)
    run = PipelineRun.of(recipe, store)
    for task in subset(run.tasks, ["seeds"]):
        Artifact(store, task.kind, task.id).commit(Manifest(id=task.id, kind=task.kind, name=task.name))
    with ray_cluster(nodes=1, node_environment={"RAY_memory_usage_threshold": f"{threshold:.4f}"}):
        launcher = RayLauncher(run, stub_engine, StageFunctions(hungry_law_stage, stub_rank))
        controller = Controller(subset(run.tasks, ["branches"]), store, launcher)
        try:
            outcome = controller.run(pause=0.1)
        finally:
            launcher.close()
    assert outcome == "finished", controller.states
    law = find_task(run.tasks, "branches", "law")
    assert isinstance(controller.states[law.id], Committed)
    causes = [attempt.cause for attempt in controller.history(law.id).past_attempts]
    assert causes[-1] == "committed"
    assert causes[0].startswith("memory ran out on node ")
    assert "GB in use, largest worker ray::TaskActor" in causes[0]
    assert "use a larger memory_gib in branch.needs" in causes[0]
    assert "\n" not in causes[0]
