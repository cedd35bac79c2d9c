"""Faults of a run on a real cluster with a real S3 server. They do not change the results of its branches.

The branches are tiny but really train. Their losses and weights are compared with those of a run without faults
(`branch_checks`).
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import MANIFEST
from tests.support.faults.branch_checks import AttemptLog, attempts
from tests.support.faults.cluster_under_test import ClusterUnderTest
from tests.support.faults.disturbed_run import DisturbedRun
from tests.support.faults.metadata_server import MetadataServer
from tests.support.faults.nodes import send, wait_for
from tests.support.faults.reference_run import ReferenceRun, branch_id, branch_manifest
from tests.support.faults.small_disk import SmallDisk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def checkpoint_manifests(run: DisturbedRun) -> list[str]:
    """Return the manifest keys of all checkpoints of the branch `code`, oldest first."""
    keys = run.store.list(f"branches/{branch_id(run.recipe, 'code')}/steps/")
    return [key for key in keys if key.endswith(f"/{MANIFEST}")]


def pid_of(log: AttemptLog) -> int:
    """Return the id of the process that an attempt runs in."""
    pid: int = log.named("started")[0]["pid"]
    return pid


def test_a_worker_is_killed(run: DisturbedRun) -> None:
    log = run.log("code")
    assert log.named("started")[0]["node"] == run.node("code"), "the log has the node name of the status"
    os.kill(pid_of(log), signal.SIGKILL)
    logs = run.finish()
    assert len(logs["code"]) == 2
    assert len(logs["law"]) == 1, "the other branches are not affected"


def test_a_raylet_is_killed(run: DisturbedRun) -> None:
    run.log("code")
    node = run.node("code")
    run.cluster.nodes[node].kill_raylet()
    run.log("code", attempt=2)
    assert run.node("code") != node
    logs = run.finish()
    assert (len(logs["code"]), len(logs["law"])) == (2, 1)


def test_a_raylet_is_terminated(run: DisturbedRun) -> None:
    run.log("code")
    node = run.node("code")
    run.cluster.nodes[node].terminate_raylet()
    run.log("code", attempt=2)
    assert run.node("code") != node
    logs = run.finish()
    assert (len(logs["code"]), len(logs["law"])) == (2, 1)


def test_a_node_gets_an_interruption_notice(run: DisturbedRun) -> None:
    run.log("code")
    node = run.node("code")
    with MetadataServer() as metadata:
        listener = run.cluster.nodes[node].start_spot_listener(metadata.url)
        metadata.announce_termination()
        assert listener.wait(60) == 0, "the watcher made Ray drain the node"
    wait_for("the branch has stopped", lambda: attempts(run.store, run.recipe, "code")[0].named("stopped"), 20)
    run.cluster.nodes[node].kill()
    logs = run.finish()
    first, second = logs["code"]
    stopped, resumed = first.named("stopped")[0]["step"], second.named("resumed")[0]["step"]
    assert first.checkpoints[-1] == stopped == resumed, "no step is repeated"
    assert run.row("code").attempt == 2
    assert len(logs["law"]) == 1


def test_the_driver_is_killed(run: DisturbedRun) -> None:
    run.log("code")
    run.driver.kill()
    run.submit()
    run.finish()
    # An actor may outlive its driver for a moment, and may even finish its task
    assert "reference: finished" in run.driver.output


def test_the_driver_of_a_submitted_job_is_killed(
    cluster: ClusterUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    reference = ReferenceRun(tmp_path / "reference", steps=1500)  # the steps of this run are not throttled
    recipe, store = reference.recipe(cluster.uri("job"), cluster.proxy.endpoint), cluster.store("job")
    run = DisturbedRun(cluster, reference, recipe, store, cluster.submit_job)
    run.log("code")
    run.driver.kill()
    run.submit()
    logs = run.finish()
    assert "reference: finished" in run.driver.output
    assert len(logs["code"]) > 1, "the first attempt had not finished"


def test_the_head_is_killed(run: DisturbedRun) -> None:
    run.log("code")
    run.cluster.nodes["head"].kill()
    assert run.driver.join() != 0, "a driver does not outlive its head"
    run.cluster.restore()
    run.submit()
    run.finish()


def test_the_store_is_killed_and_restarted(run: DisturbedRun) -> None:
    log = run.log("code")
    run.cluster.kill_s3()
    time.sleep(5.0)
    run.cluster.start_s3()
    assert attempts(run.store, run.recipe, "code")[-1].checkpoints[: len(log.checkpoints)] == log.checkpoints
    logs = run.finish()
    assert (len(logs["code"]), len(logs["law"])) == (1, 1), "training waits for the store"


def test_the_store_answers_503(run: DisturbedRun) -> None:
    proxy = run.cluster.proxy
    run.log("code")
    refused = proxy.refused
    proxy.refuse()
    wait_for("requests are refused", lambda: proxy.refused >= refused + 20)
    proxy.recover()
    logs = run.finish()
    assert (len(logs["code"]), len(logs["law"])) == (1, 1)


def test_the_store_is_ten_times_slower(run: DisturbedRun) -> None:
    run.log("code")
    run.cluster.proxy.slow_down(10.0)
    logs = run.finish()
    assert (len(logs["code"]), len(logs["law"])) == (1, 1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[Path], SmallDisk]]:
    """Return a function that mounts a small disk on a folder until the end of the test."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(SmallDisk(tmp_path))
        except OSError as error:
            pytest.skip(str(error))
        yield lambda folder: stack.enter_context(SmallDisk(folder))


def test_the_disk_of_a_node_is_full(
    cluster: ClusterUnderTest, reference: ReferenceRun, disk: Callable[[Path], SmallDisk]
) -> None:
    disks = {name: disk(node.temporary) for name, node in cluster.nodes.items()}
    run = DisturbedRun(
        cluster, reference, reference.recipe(cluster.uri("full"), cluster.proxy.endpoint), cluster.store("full")
    )
    run.log("code")
    node = run.node("code")
    disks[node].fill()
    run.log("code", attempt=2)
    assert run.node("code") != node
    logs = run.finish()
    error = logs["code"][0].named("failed")[0]["error"]
    assert error.startswith(f"TrainingError: no checkpoint can be written to {cluster.nodes[node].temporary}"), error
    assert len(logs["law"]) == 1


def test_the_disk_of_the_store_is_full(
    cluster: ClusterUnderTest,
    reference: ReferenceRun,
    disk: Callable[[Path], SmallDisk],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("store")
    small = disk(folder)
    run = DisturbedRun(cluster, reference, reference.recipe(str(folder)), open_store(str(folder)))
    run.log("code")
    small.fill()
    known = checkpoint_manifests(run)[-1]
    time.sleep(5.0)
    assert checkpoint_manifests(run)[-1] == known, "no checkpoint is written to a full disk"
    small.empty()
    logs = run.finish()
    assert (len(logs["code"]), len(logs["law"])) == (1, 1), "training waits for free space"


def test_a_node_is_unreachable_for_a_while(run: DisturbedRun) -> None:
    zombie = pid_of(run.log("code"))
    node = run.cluster.nodes[run.node("code")]
    node.freeze()
    run.log("code", step=100, attempt=2)
    send(signal.SIGCONT, [zombie])  # the process alone, because its raylet would stop it
    failed = wait_for(
        "the attempt finds that it is stale", lambda: attempts(run.store, run.recipe, "code")[0].named("failed")
    )
    assert failed[0]["error"].startswith("StaleLease: attempt 0001.0001 at branches/code-"), failed
    node.resume()
    logs = run.finish()
    assert (len(logs["code"]), len(logs["law"])) == (2, 1)


def test_a_loss_is_not_finite_once(run: DisturbedRun) -> None:
    run.log("code")
    mark = run.cluster.nodes[run.node("code")].break_weights()
    logs = run.finish()
    assert not mark.exists()
    (log,) = logs["code"]
    (back,) = log.named("rolled_back")
    assert "is not finite" in back["error"]
    assert back["to"] < back["step"]
    assert not logs["law"][0].named("rolled_back")


def test_a_loss_is_not_finite_repeatedly(cluster: ClusterUnderTest, reference: ReferenceRun) -> None:
    recipe = reference.recipe(cluster.uri("nan"), cluster.proxy.endpoint, peak_lr=1e30)
    run = DisturbedRun(cluster, reference, recipe, cluster.store("nan"))
    assert run.driver.join() == 1
    for domain in reference.domains:
        (log,) = attempts(run.store, recipe, domain)
        (back,) = log.named("rolled_back")
        row = run.row(domain)
        assert row.state == "failed"
        assert row.error is not None
        assert row.error.startswith(f"step {back['step']}: the loss (") and "lower peak_lr" in row.error


def test_a_checkpoint_in_the_store_is_damaged(run: DisturbedRun) -> None:
    run.log("code", step=80)
    assert run.driver.stop() == 130
    before, newest = checkpoint_manifests(run)
    damaged = newest.replace(MANIFEST, "optimizer.safetensors")
    data = bytearray(run.store.get(damaged))
    data[-1] ^= 1
    run.store.put(damaged, bytes(data))
    run.submit()
    logs = run.finish()
    (refused,) = logs["code"][1].named("refused")
    assert refused["checkpoint"] == newest.split("/")[-2]
    assert logs["code"][1].named("resumed")[0]["step"] == int(before.split("/")[-2].rpartition("-")[2])
    (reason,) = branch_manifest(run.store, run.recipe, "code").facts["refused_checkpoints"]
    assert damaged in reason and "damaged" in reason


def test_a_worker_hangs(start: Callable[..., DisturbedRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_HANG_SECONDS", "10")
    run = start(step_seconds=0.1)
    hung = pid_of(run.log("code"))
    send(signal.SIGSTOP, [hung])
    run.log("code", attempt=2)
    assert run.row("code").past[0].cause.startswith("no sign of progress for ")
    wait_for("the hung process is gone", lambda: not Path(f"/proc/{hung}").exists(), 60)
    logs = run.finish()
    assert (len(logs["code"]), len(logs["law"])) == (2, 1)


def test_a_committed_branch_is_damaged(run: DisturbedRun) -> None:
    run.finish()
    damaged = branch_manifest(run.store, run.recipe, "code")
    key = f"branches/{damaged.id}/{damaged.folder}/model.safetensors"
    data = bytearray(run.store.get(key))
    data[-1] ^= 1
    run.store.put(key, bytes(data))
    run.driver = run.cluster.submit(run.recipe, kind="upcycled")
    logs = run.finish()
    again = branch_manifest(run.store, run.recipe, "code")
    assert again.folder != damaged.folder
    assert again.files["model.safetensors"] == damaged.files["model.safetensors"]
    assert (len(logs["code"]), len(logs["law"])) == (2, 1), "only the damaged branch is made again"
    mark = run.store.get(f"branches/{damaged.id}/manifest-0000.damaged.json").decode()
    assert "model.safetensors does not match its manifest" in mark
    assert "upcycled/bam found its files damaged" in " ".join(run.driver.output.split())
