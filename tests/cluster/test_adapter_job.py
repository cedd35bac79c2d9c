"""`jobs/adapters.py` on a real cluster, with a worker that is killed while it trains topics."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from bam_ray.adapters.bundles import AdapterIndex
from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import MANIFEST, ArtifactKind
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import Recipe
from tests.support.adapter_run import ADAPTERS
from tests.support.faults.nodes import wait_for
from tests.support.stage_run import make_artifacts, small_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


def digests(recipe: Recipe) -> dict[str, str]:
    """Return the digest of each adapter of the only task, after reading all of them."""
    run = PipelineRun.of(recipe, open_store(recipe.store.uri))
    index = AdapterIndex(run.artifact(ArtifactKind.ADAPTERS, "part-00"))
    return {name: index.entry(name).sha256 for name in index.names if index.read(name)}


def test_a_killed_worker_loses_only_its_topic(cluster: Cluster, tmp_path: Path) -> None:
    training = {**ADAPTERS["training"], "tokens": 128 * 100}
    recipe = small_recipe(
        tmp_path,
        topics={"count": 5, "embedder": "tfidf", "min_documents": 3},
        adapters={**ADAPTERS, "tasks": 1, "training": training},
    )
    store = open_store(recipe.store.uri)
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())
    command = [sys.executable, "jobs/adapters.py", "--recipe", str(path)]
    driver = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": cluster.address})
    prefix = PipelineRun.of(recipe, store).artifact(ArtifactKind.ADAPTERS, "part-00").prefix

    def first_is_saved() -> bool:
        assert driver.poll() is None, "the job has ended"
        return any(key.endswith(MANIFEST) for key in store.list(f"{prefix}/steps/"))

    wait_for("an adapter is saved", first_is_saved, 240)
    (events,) = store.list(f"{prefix}/events/")
    os.kill(json.loads(store.get(events).splitlines()[0])["pid"], signal.SIGKILL)
    assert driver.wait(240) == 0
    assert len(list(store.list(f"{prefix}/leases/"))) == 2

    alone = recipe.model_copy(update={"store": recipe.store.model_copy(update={"uri": str(tmp_path / "alone")})})
    make_artifacts(alone, open_store(alone.store.uri), ("corpora", "seeds", "topics", "adapters"))
    assert digests(recipe) == digests(alone)
