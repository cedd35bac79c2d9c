"""Progress reaches the Prometheus endpoint of a real Ray node."""

import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray

from bam_ray.blobs.folder import FolderStore
from bam_ray.control.observations import Done
from bam_ray.on_ray.task_actor import remote_class
from bam_ray.on_ray.work import Work
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.settings import parse_recipe
from cluster.processes import free_ports
from tests.support.cluster.stub_stages import RECIPE, STUB_STAGES

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A node that serves its metrics there."""
    (port,) = free_ports(1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # workers unpickle the stubs
    with tempfile.TemporaryDirectory(prefix="bam-gauges-") as folder:
        ray.init(
            address="local",
            num_cpus=1,
            object_store_memory=100 << 20,
            _temp_dir=folder,
            _metrics_export_port=port,
            include_dashboard=False,
            log_to_driver=False,
        )
        yield f"http://127.0.0.1:{port}/metrics"
        ray.shutdown()


def test_a_task_s_progress_is_served_as_gauges(endpoint: str, tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE.replace("STORE", str(tmp_path)), "test")
    task = find_task(task_graph(recipe), "branches", "code")
    actor = remote_class().remote()
    ray.get(actor.start.remote(Work(task, recipe, FolderStore(tmp_path), STUB_STAGES)))
    while not isinstance(ray.get(actor.poll.remote()), Done):
        time.sleep(0.1)
    wanted = {
        "ray_bam_step": 40.0,
        "ray_bam_total_steps": 40.0,
        "ray_bam_loss_nll": 1 / 40,
        "ray_bam_checkpoint_step": 40.0,
        "ray_bam_curve lr": 1 / 4000,
    }
    found: dict[str, float] = {}
    until = time.monotonic() + 60
    while found != wanted and time.monotonic() < until:  # nodes collect what actors measure every few seconds
        time.sleep(0.5)
        text = httpx.get(endpoint).text
        lines = re.findall(r"^(ray_bam_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
        found = {
            " ".join([name, *re.findall(r'\bcurve="([^"]*)"', tags)]): float(value)
            for name, tags, value in lines
            if 'kind="branches"' in tags and 'name="code"' in tags
        }
    assert found == pytest.approx(wanted)
