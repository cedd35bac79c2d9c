"""What can befall a run, each on a real cluster and a real S3 server; afterwards its branches are as if nothing had.

The branches are tiny, but train for real, so that losses and weights can be compared with those of a run that nothing
disturbed (`faults.checking`).
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.checking import Log, attempts, check_branches
from faults.disk import SmallDisk
from faults.metadata import Metadata
from faults.tale import Tale, branch_id, branch_manifest
from faults.world import Job, Run, World, send, wait_for

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.manifest import MANIFEST
from bam_ray.control import status
from bam_ray.control.status import TaskRow
from bam_ray.settings import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def tale(tmp_path_factory: pytest.TempPathFactory) -> Tale:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Tale(tmp_path_factory.mktemp("tale"))


@pytest.fixture(scope="module")
def one_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
def world(one_world: World) -> World:
    """With all its nodes and its store."""
    one_world.mend()
    return one_world


class Story:
    """A run that has begun."""

    def __init__(
        self,
        world: World,
        tale: Tale,
        recipe: Recipe,
        store: BlobStore,
        submit: Callable[[Recipe], Run | Job] | None = None,
    ) -> None:
        self.world, self.recipe, self.store = world, recipe, store
        self._tale, self._submit = tale, submit or world.submit
        tale.begin(store)
        self.go_on()

    def log(self, domain: str, step: int = 40, attempt: int = 1) -> Log:
        """Of the newest attempt at a branch, once it is number `attempt` at least and that step is acknowledged."""

        def reached() -> Log | None:
            assert self.run.goes_on, self.run.said
            logs = attempts(self.store, self.recipe, domain)
            newest = logs[-1] if len(logs) >= attempt else None
            return newest if newest and max(newest.checkpoints, default=-1) >= step else None

        log: Log = wait_for(f"attempt {attempt} at {domain} is at step {step}\n{self.run.said[-3000:]}", reached)
        return log

    def row(self, domain: str) -> TaskRow:
        """A branch in the run's status."""
        now = status.read(self.store)
        assert now is not None
        return next(row for row in now.rows if (row.kind, row.name) == ("branches", domain))

    def node(self, domain: str) -> str:
        """The name of the node a branch is on."""
        name: str = wait_for(f"{domain} is on a node", lambda: self.row(domain).node)
        return name

    def go_on(self) -> None:
        """Submit the run, or the same run again."""
        self.run = self._submit(self.recipe)

    def finish(self) -> dict[str, list[Log]]:
        """Wait for the end, and see that all is well; returns the attempts by domain."""
        assert self.run.join() == 0, self.run.said[-3000:]
        return check_branches(self.store, self.recipe, self._tale.unbroken)


@pytest.fixture
def story(world: World, tale: Tale, request: pytest.FixtureRequest) -> Story:
    """A run over the S3 server, that has just begun."""
    name = request.node.name.translate(str.maketrans("_[]", "---"))
    return Story(world, tale, tale.recipe(world.uri(name), world.proxy.endpoint), world.store(name))


def manifests_of_steps(story: Story) -> list[str]:
    """The keys of the manifests of all checkpoints of the branch `code`, oldest first."""
    keys = story.store.list(f"branches/{branch_id(story.recipe, 'code')}/steps/")
    return [key for key in keys if key.endswith(f"/{MANIFEST}")]


def pid_of(log: Log) -> int:
    """The process that an attempt runs in."""
    pid: int = log.named("started")[0]["pid"]
    return pid


def test_a_worker_is_killed(story: Story) -> None:
    log = story.log("code")
    assert log.named("started")[0]["node"] == story.node("code"), "told as the status names it"
    os.kill(pid_of(log), signal.SIGKILL)
    logs = story.finish()
    assert len(logs["code"]) == 2
    assert len(logs["law"]) == 1, "the others are left alone"


def test_a_raylet_is_killed(story: Story) -> None:
    story.log("code")
    node = story.node("code")
    story.world.nodes[node].kill_raylet()
    story.log("code", attempt=2)
    assert story.node("code") != node
    logs = story.finish()
    assert (len(logs["code"]), len(logs["law"])) == (2, 1)


def test_a_raylet_is_asked_to_stop(story: Story) -> None:
    story.log("code")
    node = story.node("code")
    story.world.nodes[node].terminate_raylet()
    story.log("code", attempt=2)
    assert story.node("code") != node
    logs = story.finish()
    assert (len(logs["code"]), len(logs["law"])) == (2, 1)


def test_a_notice_says_that_a_node_will_be_taken_away(story: Story) -> None:
    story.log("code")
    node = story.node("code")
    with Metadata() as metadata:
        ear = story.world.nodes[node].listen_for_notice(metadata.url)
        metadata.notice()
        assert ear.wait(60) == 0, "Ray was told"
    wait_for("the branch has stopped", lambda: attempts(story.store, story.recipe, "code")[0].named("stopped"), 20)
    story.world.nodes[node].kill()
    logs = story.finish()
    first, second = logs["code"]
    stopped, resumed = first.named("stopped")[0]["step"], second.named("resumed")[0]["step"]
    assert first.checkpoints[-1] == stopped == resumed, "not a step was done twice"
    assert story.row("code").attempt == 2
    assert len(logs["law"]) == 1


def test_the_driver_is_killed(story: Story) -> None:
    story.log("code")
    story.run.kill()
    story.go_on()
    story.finish()
    # An actor may outlive its driver for a moment, and even get done
    assert "tale: finished" in story.run.said


def test_the_driver_of_a_submitted_job_is_killed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    tale = Tale(tmp_path / "tale", steps=1500)  # nothing holds its steps back
    recipe, store = tale.recipe(world.uri("job"), world.proxy.endpoint), world.store("job")
    story = Story(world, tale, recipe, store, world.submit_job)
    story.log("code")
    story.run.kill()
    story.go_on()
    logs = story.finish()
    assert "tale: finished" in story.run.said
    assert len(logs["code"]) > 1, "the first attempt had not got done"


def test_the_head_is_killed(story: Story) -> None:
    story.log("code")
    story.world.nodes["head"].kill()
    assert story.run.join() != 0, "a driver does not outlive its head"
    story.world.mend()
    story.go_on()
    story.finish()


def test_the_store_is_killed_and_comes_back(story: Story) -> None:
    log = story.log("code")
    story.world.kill_s3()
    time.sleep(5.0)
    story.world.start_s3()
    assert attempts(story.store, story.recipe, "code")[-1].checkpoints[: len(log.checkpoints)] == log.checkpoints
    logs = story.finish()
    assert (len(logs["code"]), len(logs["law"])) == (1, 1), "training waits for the store"


def test_the_store_answers_503(story: Story) -> None:
    proxy = story.world.proxy
    story.log("code")
    refused = proxy.refused
    proxy.refuse()
    wait_for("requests are refused", lambda: proxy.refused >= refused + 20)
    proxy.heal()
    logs = story.finish()
    assert (len(logs["code"]), len(logs["law"])) == (1, 1)


def test_the_store_is_ten_times_slower(story: Story) -> None:
    story.log("code")
    story.world.proxy.slow_down(10.0)
    logs = story.finish()
    assert (len(logs["code"]), len(logs["law"])) == (1, 1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[Path], SmallDisk]]:
    """Mounts a small disk on a folder until the test is over."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(SmallDisk(tmp_path))
        except OSError as error:
            pytest.skip(str(error))
        yield lambda folder: stack.enter_context(SmallDisk(folder))


def test_a_nodes_disk_is_full(world: World, tale: Tale, disk: Callable[[Path], SmallDisk]) -> None:
    disks = {name: disk(node.temporary) for name, node in world.nodes.items()}
    story = Story(world, tale, tale.recipe(world.uri("full"), world.proxy.endpoint), world.store("full"))
    story.log("code")
    node = story.node("code")
    disks[node].fill()
    story.log("code", attempt=2)
    assert story.node("code") != node
    logs = story.finish()
    said = logs["code"][0].named("failed")[0]["error"]
    assert said.startswith(f"TrainingError: no checkpoint can be written to {world.nodes[node].temporary}"), said
    assert len(logs["law"]) == 1


def test_the_stores_disk_is_full(
    world: World, tale: Tale, disk: Callable[[Path], SmallDisk], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("store")
    small = disk(folder)
    story = Story(world, tale, tale.recipe(str(folder)), open_store(str(folder)))
    story.log("code")
    small.fill()
    known = manifests_of_steps(story)[-1]
    time.sleep(5.0)
    assert manifests_of_steps(story)[-1] == known, "nothing gets through"
    small.empty()
    logs = story.finish()
    assert (len(logs["code"]), len(logs["law"])) == (1, 1), "training waits for room"


def test_a_node_is_cut_off_and_comes_back(story: Story) -> None:
    zombie = pid_of(story.log("code"))
    node = story.world.nodes[story.node("code")]
    node.freeze()
    story.log("code", step=100, attempt=2)
    send(signal.SIGCONT, [zombie])  # its raylet would take it down
    failed = wait_for("it sees", lambda: attempts(story.store, story.recipe, "code")[0].named("failed"))
    assert failed[0]["error"].startswith("StaleLease: attempt 1 at branches/code-"), failed
    node.thaw()
    logs = story.finish()
    assert (len(logs["code"]), len(logs["law"])) == (2, 1)


def test_a_loss_that_is_not_finite_once(story: Story) -> None:
    story.log("code")
    mark = story.world.nodes[story.node("code")].break_weights()
    logs = story.finish()
    assert not mark.exists()
    (log,) = logs["code"]
    (back,) = log.named("rolled_back")
    assert "is not finite" in back["error"]
    assert back["to"] < back["step"]
    assert not logs["law"][0].named("rolled_back")


def test_a_loss_that_is_not_finite_again(world: World, tale: Tale) -> None:
    recipe = tale.recipe(world.uri("nan"), world.proxy.endpoint, peak_lr=1e30)
    story = Story(world, tale, recipe, world.store("nan"))
    assert story.run.join() == 1
    for domain in tale.domains:
        (log,) = attempts(story.store, recipe, domain)
        (back,) = log.named("rolled_back")
        row = story.row(domain)
        assert row.state == "failed"
        assert row.error is not None
        assert row.error.startswith(f"step {back['step']}: the loss (") and "lower peak_lr" in row.error


def test_a_checkpoint_in_the_store_is_damaged(story: Story) -> None:
    story.log("code", step=80)
    assert story.run.stop() == 130
    before, newest = manifests_of_steps(story)
    damaged = newest.replace(MANIFEST, "optimizer.safetensors")
    data = bytearray(story.store.get(damaged))
    data[-1] ^= 1
    story.store.put(damaged, bytes(data))
    story.go_on()
    logs = story.finish()
    (refused,) = logs["code"][1].named("refused")
    assert refused["checkpoint"] == newest.split("/")[-2]
    assert logs["code"][1].named("resumed")[0]["step"] == int(before.split("/")[-2].rpartition("-")[2])
    (said,) = branch_manifest(story.store, story.recipe, "code").facts["refused_checkpoints"]
    assert damaged in said and "damaged" in said
