"""The progress of a task reaches the Prometheus endpoint of a real Ray node."""

import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.leases import AttemptNumber
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.observations import Done
from bam_ray.control.transitions import PlacedTask
from bam_ray.on_ray.task_actor import remote_class
from bam_ray.on_ray.work import Work
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import parse_recipe
from cluster.processes import free_ports
from tests.support.cluster.stub_stages import RECIPE, STUB_STAGES

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a Ray node, and return the URL of its metrics."""
    (port,) = free_ports(1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # workers unpickle the stubs
    with tempfile.TemporaryDirectory(prefix="bam-gauges-", ignore_cleanup_errors=True) as folder:
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


def test_progress_is_served_as_gauges(endpoint: str, tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE.replace("STORE", str(tmp_path)), "test")
    run = PipelineRun.of(recipe, FolderStore(tmp_path))
    actor = remote_class().remote()
    placed = PlacedTask(run.task(ArtifactKind.BRANCHES, "code"), AttemptNumber(1, 1), ("", ""))
    ray.get(actor.start.remote(Work(placed, run, STUB_STAGES)))
    while not isinstance(ray.get(actor.poll.remote()), Done):
        time.sleep(0.1)
    expected = {
        "ray_bam_step": 40.0,
        "ray_bam_total_steps": 40.0,
        "ray_bam_loss_nll": 1 / 40,
        "ray_bam_checkpoint_step": 40.0,
        "ray_bam_curve lr": 1 / 4000,
    }
    found: dict[str, float] = {}
    deadline = time.monotonic() + 60
    while (
        found != expected and time.monotonic() < deadline
    ):  # a node collects the metrics of its actors every few seconds
        time.sleep(0.5)
        text = httpx.get(endpoint).text
        lines = re.findall(r"^(ray_bam_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
        found = {
            " ".join([name, *re.findall(r'\bcurve="([^"]*)"', tags)]): float(value)
            for name, tags, value in lines
            if 'kind="branches"' in tags and 'name="code"' in tags
        }
    assert found == pytest.approx(expected)
