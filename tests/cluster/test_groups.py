"""Process groups that really train survive the loss of a rank, a node and their driver.

Their results are those of a group that nothing disturbs. A group also leaves a node before it is taken away.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from bam_ray.blobs import open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control import status
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.settings import Recipe, UpcycleSettings
from tests.support.cluster.ray_cluster import add_node
from tests.support.stage_run import (
    TRAINING,
    make_artifacts,
    small_recipe,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 60


def two_worker_recipe(folder: Path, store: str, branch: dict[str, Any] | None = None, **mix: Any) -> Recipe:
    """Return a recipe whose branch and mixture are trained by two workers, for long enough to be disturbed."""
    training = {**TRAINING, "tokens": STEPS * TRAINING["batch_tokens"], "peak_lr": 0.005, "checkpoint_every": 5}
    return small_recipe(
        folder,
        store={"uri": str(folder / store)},
        branch={"domains": ["code"], "training": training, "workers": 2, **(branch or {})},
        upcycle={"mixtures": {"bam": {"method": "bam", "num_experts_per_tok": 2, "norm_topk_prob": True}}},
        # Each of two processes computes two micro batches of one sequence; a single process computes two of two
        mix={"training": {**training, "micro_batch_sequences": 1}, "expert_parallel": 2, **mix},
    )


@pytest.fixture(scope="module")
def folder(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the store `undisturbed`, of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("groups")
    run = two_worker_recipe(folder, "undisturbed")
    make_artifacts(run, open_store(run.store.uri), ("corpora", "seeds"))
    DriverProcess(cluster.address, folder, run, "mixtures", step_seconds=0.0).join()
    return folder


class DriverProcess:
    """A process that runs one kind of task on the cluster."""

    def __init__(
        self, address: str, folder: Path, run: Recipe, kind: ArtifactKind, *timeout: str, step_seconds: float = 0.3
    ) -> None:
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
        self.store = open_store(run.store.uri)
        self.made = artifact(run, kind)
        self._log = folder / "driver.log"
        self._arguments = [
            sys.executable,
            "-m",
            "tests.support.faults.throttled_driver",
            str(file),
            kind,
            str(step_seconds),
            *timeout,
        ]
        self._environment = os.environ | {"RAY_ADDRESS": address}
        self.start()

    def start(self) -> None:
        with self._log.open("a") as log:
            self.process = subprocess.Popen(self._arguments, env=self._environment, stdout=log, stderr=log)

    def rank(self, other_than: int = 0) -> list[Any]:
        """Return [node id, process id] of rank 1 of two, when it is not the process `other_than` and has trained."""
        found: list[list[Any]] = []
        known = self.steps()

        def trains() -> bool:
            if not self.store.exists("ranks/2-1.json"):
                return False
            found.append(json.loads(self.store.get("ranks/2-1.json")))
            return found[-1][1] != other_than and len(self.steps() - known) >= 2

        self.wait_for(trains)
        return found[-1]

    def steps(self) -> set[str]:
        """Return the manifest keys of all checkpoints."""
        return {key for key in self.store.list(f"{self.made.prefix}/steps/") if key.endswith("/manifest.json")}

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < until, self._log.read_text()
            time.sleep(0.2)

    def join(self) -> None:
        assert self.process.wait(timeout=300) == 0, self._log.read_text()


def artifact(run: Recipe, kind: ArtifactKind) -> Artifact:
    """Return the branch or the mixture of a run."""
    name = "code" if kind == "branches" else "bam"
    return Artifact(open_store(run.store.uri), kind, find_task(task_graph(run), kind, name).id)


def losses(made: Artifact) -> list[tuple[float, ...]]:
    """Return the NLL, the load-balance loss and the gradient norm of every step."""
    folder = made.fetch()
    return [
        (point["nll"], point["load_balance"], point["grad_norm"])
        for point in json.loads((folder / "curve.json").read_text())
    ]


def copy_parents(folder: Path, kind: ArtifactKind, store: str) -> None:
    """Make a store with everything that a task of `kind` is made from."""
    made = ["branches", "upcycled", "mixtures"]
    shutil.copytree(
        folder / "undisturbed", folder / store, ignore=shutil.ignore_patterns("ranks", *made[made.index(kind) :])
    )


def kill_node(running: Cluster, node_id: str) -> None:
    victim = next(node for node in running.list_all_nodes() if node.node_id == node_id)
    os.kill(victim.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    running.remove_node(victim, allow_graceful=False)


@pytest.mark.parametrize("kind", ["branches", "mixtures"])
def test_a_group_survives_a_rank_a_node_and_its_driver(
    cluster: Cluster,
    folder: Path,
    kind: ArtifactKind,
    tmp_path: Path,
) -> None:
    copy_parents(folder, kind, kind)
    run = two_worker_recipe(folder, kind)
    driver = DriverProcess(cluster.address, tmp_path, run, kind)
    _, pid = driver.rank()
    os.kill(pid, signal.SIGKILL)
    node_id, pid = driver.rank(other_than=pid)
    kill_node(cluster, node_id)
    try:
        _, pid = driver.rank(other_than=pid)
        driver.process.kill()
        driver.process.wait()
        driver.start()
        driver.join()
    finally:
        add_node(cluster)
    assert losses(driver.made) == losses(artifact(two_worker_recipe(folder, "undisturbed"), kind))
    leases = list(driver.store.list(f"{driver.made.prefix}/leases/"))
    assert len(leases) == 4, "three attempts were killed, and the fourth finished"


def test_a_group_with_a_hung_rank_is_replaced(
    cluster: Cluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAM_HANG_SECONDS", "15")
    copy_parents(folder, "branches", "hung")
    driver = DriverProcess(cluster.address, tmp_path, two_worker_recipe(folder, "hung"), "branches")
    _, pid = driver.rank()
    os.kill(pid, signal.SIGSTOP)
    driver.rank(other_than=pid)
    driver.wait_for(lambda: not Path(f"/proc/{pid}").exists())
    driver.join()
    assert losses(driver.made) == losses(artifact(two_worker_recipe(folder, "undisturbed"), "branches"))
    last = status.read(driver.store)
    assert last is not None
    past = next(row for row in last.rows if row.id == driver.made.id).past
    assert past[-2].cause.startswith("no sign of progress for ") and past[-1].cause == "committed"


def test_a_group_leaves_a_node_that_will_be_taken_away(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    copy_parents(folder, "branches", "noticed")
    run = two_worker_recipe(folder, "noticed", branch={"needs": {"cpus": 2}})
    driver = DriverProcess(cluster.address, tmp_path, run, "branches")
    node_id, pid = driver.rank()
    assert json.loads(driver.store.get("ranks/2-0.json"))[0] != node_id, "the node of rank 1, not that of rank 0"
    in_a_minute = time.time_ns() // 1_000_000 + 60_000
    assert GcsClient(address=cluster.address).drain_node(node_id, DRAIN_NODE_REASON_PREEMPTION, "spot", in_a_minute)[0]
    try:
        driver.rank(other_than=pid)
        kill_node(cluster, node_id)  # no rank runs on it any more
        driver.join()
    finally:
        add_node(cluster)
    assert losses(driver.made) == losses(artifact(two_worker_recipe(folder, "undisturbed"), "branches"))
    first, second = (
        [json.loads(line) for line in driver.store.get(key).splitlines()]
        for key in driver.store.list(f"{driver.made.prefix}/events/")
    )
    (stopped,) = [event["step"] for event in first if event["event"] == "stopped"]
    (resumed,) = [event["step"] for event in second if event["event"] == "resumed"]
    assert stopped == resumed, "no step is repeated"


def test_a_mixture_continues_with_fewer_workers(
    cluster: Cluster,
    folder: Path,
    tmp_path: Path,
) -> None:
    copy_parents(folder, "mixtures", "elastic")
    run = two_worker_recipe(folder, "elastic", min_workers=1, needs={"cpus": 2})
    driver = DriverProcess(cluster.address, tmp_path, run, "mixtures", "1")
    driver.rank()
    nodes = [json.loads(driver.store.get(f"ranks/2-{rank}.json"))[0] for rank in (0, 1)]
    for node_id in nodes:
        kill_node(cluster, node_id)
    try:
        driver.join()
    finally:
        add_node(cluster)
        add_node(cluster)
    assert driver.store.exists("ranks/1-0.json")
    undisturbed = losses(artifact(two_worker_recipe(folder, "undisturbed"), "mixtures"))
    for step, wanted in zip(losses(driver.made), undisturbed, strict=True):
        assert step == pytest.approx(wanted, rel=1e-5)


def test_an_absorbed_branch_survives_the_loss_of_a_rank(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(
        folder / "undisturbed", folder / "late", ignore=shutil.ignore_patterns("ranks", "upcycled", "mixtures")
    )
    steps = 2 * STEPS  # the branch trains beside the mixture, and is committed well before the mixture ends
    training = {**TRAINING, "tokens": steps * TRAINING["batch_tokens"], "checkpoint_every": 5}
    one_branch = two_worker_recipe(folder, "late", training={**training, "micro_batch_sequences": 1})
    run = one_branch.model_copy(
        update={
            "branch": one_branch.branch.model_copy(update={"domains": ["code", "general"]}),
            "upcycle": UpcycleSettings.model_validate(
                {"mixtures": {"bam": {"method": "bam", "num_experts": 4}}, "when": {"at_least": 1}}
            ),
        }
    )
    driver = DriverProcess(cluster.address, tmp_path, run, "mixtures")
    driver.wait_for(lambda: any(".0002-" in key for key in driver.steps()))
    _, pid = driver.rank()
    os.kill(pid, signal.SIGKILL)
    driver.join()
    made = driver.made.fetch()
    assert json.loads((made / "config.json").read_text())["expert_names"] == ["seed", "code", "seed-2", "general"]
    upcycled, absorb = json.loads((made / "lineage.json").read_text())["history"]
    assert list(upcycled["of"]) == ["seed", "code"]
    assert list(absorb["of"]) == ["mixture", "general"]
    assert 5 <= absorb["absorb"]["step"] < steps
    assert len(losses(driver.made)) == steps
    last = status.read(driver.store)
    assert last is not None
    past = next(row for row in last.rows if row.id == driver.made.id).past
    assert past[0].cause == "to absorb general" and past[-1].cause == "committed"
    assert len(list(driver.store.list(f"{driver.made.prefix}/leases/"))) == 3
