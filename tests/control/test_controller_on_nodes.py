"""The controller on nodes of different speeds: placement, moves, fallbacks and requests that cannot be satisfied."""

from dataclasses import replace

import pytest

from bam_ray.control import policies
from bam_ray.control.controller import Controller
from bam_ray.control.observations import Alive, Done, Stopped
from bam_ray.errors import PlacementError
from bam_ray.pipeline.states import (
    Committed,
    Draining,
    Node,
    Placing,
    Retrying,
    Running,
    Waiting,
)
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.feasibility import JOIN_TIMEOUT
from bam_ray.scheduling.nodes import HEAD, NodeFacts
from bam_ray.settings import Demand, Needs
from tests.support.control.scripted_launcher import (
    NODE,
    ControllerHarness,
    commit_task,
    make_measurable_task,
    make_node,
    make_task,
)


class TwoNodesHarness(ControllerHarness):
    """A controller on two nodes: `fast` makes ten steps per second, `slow` makes one."""

    def __init__(self, *tasks: Task) -> None:
        super().__init__(*tasks)
        self.launcher.known_nodes = [make_node("fast"), make_node("slow")]

    def busy(self, *names: str) -> None:
        """Set the nodes that have no free capacity."""
        self.launcher.known_nodes = [make_node(name, free=0.0 if name in names else 1.0) for name in ("fast", "slow")]

    def measure(self) -> None:
        """Let `a` and `b` start on the two nodes and report steps, so that their speeds are measured."""
        self.step()
        self.busy("fast", "slow")
        on = {"a": Node("fast", "fast"), "b": Node("slow", "slow")}
        self.step(**{name: Alive(node, None) for name, node in on.items()})
        self.now = 1.0
        self.step(**{name: Alive(node, Progress(1, 100)) for name, node in on.items()})
        self.now = 4.0
        self.step(a=Alive(on["a"], Progress(31, 100)), b=Alive(on["b"], Progress(4, 100)))


def test_without_measured_speeds_tasks_fill_the_free_nodes() -> None:
    harness = TwoNodesHarness(make_measurable_task("a"), make_measurable_task("b", 90), make_measurable_task("c", 80))
    harness.step()
    assert harness.launcher.chosen_nodes == {"a": None, "b": None}
    assert harness.launcher.expected == [["a", "b", "c"]], "an autoscaling cluster learns of all three"


def test_with_measured_speeds_the_longest_task_gets_the_fastest_node() -> None:
    harness = TwoNodesHarness(
        make_measurable_task("a"),
        make_measurable_task("b"),
        make_measurable_task("c", 80),
        make_measurable_task("d", 50),
    )
    harness.measure()
    assert harness.controller.eta("a") == pytest.approx(6.9)
    assert harness.controller.eta("b") == pytest.approx(96)
    harness.busy()
    commit_task(harness.store, harness.tasks["a"])
    commit_task(harness.store, harness.tasks["b"])
    harness.step(a=Done(NODE, Progress(100, 100)), b=Done(NODE, Progress(100, 100)))
    assert harness.launcher.chosen_nodes == {"a": None, "b": None, "c": "fast", "d": "slow"}


def test_a_task_moves_to_a_faster_node_that_becomes_free() -> None:
    harness = TwoNodesHarness(make_measurable_task("a"), make_measurable_task("b"))
    harness.measure()
    slow = Node("slow", "slow")
    harness.now = 12.0
    harness.busy("slow")
    harness.controller.throughput.record_checkpoint(("dense", "1 CPU"), 1.0)
    commit_task(harness.store, harness.tasks["a"])
    harness.step(a=Done(Node("fast", "fast"), Progress(100, 100)), b=Alive(slow, Progress(12, 100)))
    assert harness.kinds() == {"a": Committed, "b": Draining}
    assert harness.launcher.drained == ["b"]
    harness.now = 13.0
    harness.busy()
    harness.step(b=Stopped(slow, Progress(13, 100, checkpoint_step=13)))
    assert harness.launcher.chosen_nodes["b"] == "fast"
    assert harness.controller.history("b").past_attempts[0].cause == "moved"
    harness.busy("fast")
    harness.step(b=Alive(Node("fast", "fast"), None))
    state = harness.controller.states["b"]
    assert isinstance(state, Running)
    assert state.progress.step == 13, "the step of its checkpoint is shown while it reads the checkpoint"
    assert harness.controller.eta("b") == pytest.approx(8.7), "the speed measured on that node is used"
    assert harness.controller.history("b").failures == 0


def test_a_task_that_does_not_move_in_time_is_killed() -> None:
    harness = TwoNodesHarness(make_measurable_task("a"), make_measurable_task("b"))
    harness.measure()
    harness.now = 12.0
    harness.busy("slow")
    commit_task(harness.store, harness.tasks["a"])
    stuck = Alive(Node("slow", "slow"), Progress(12, 100))
    harness.controller.throughput.record_checkpoint(("dense", "1 CPU"), 1.0)
    harness.step(a=Done(Node("fast", "fast"), Progress(100, 100)), b=stuck)
    harness.now += policies.STOP_TIMEOUT + 1
    harness.step(b=stuck)
    assert harness.kinds()["b"] is Draining, "a move allows more time for a large checkpoint than a stop"
    harness.now += policies.MOVE_TIMEOUT
    harness.step(b=stuck)
    assert harness.launcher.chosen_nodes["b"] == "fast"


def test_a_task_is_placed_again_if_its_node_does_not_start_it() -> None:
    harness = TwoNodesHarness(make_measurable_task("a"), make_measurable_task("b"), make_measurable_task("c", 80))
    harness.measure()
    harness.busy("slow")
    harness.finish("a")
    assert harness.launcher.chosen_nodes["c"] == "fast"
    harness.launcher.known_nodes = [make_node("fast-again"), make_node("slow", free=0.0)]
    harness.step()
    assert harness.launcher.chosen_nodes["c"] == "fast-again"
    harness.now += policies.PIN_TIMEOUT + 1
    harness.step()
    assert harness.launcher.names.count("c") == 3, "the node did not start it in time"


def test_tasks_leave_a_node_that_will_be_taken_away() -> None:
    harness = TwoNodesHarness(
        make_measurable_task("a"),
        make_measurable_task("b"),
        replace(make_measurable_task("c", 80), needs=Needs(labels={"kind": "fast"})),
    )
    harness.measure()
    assert harness.launcher.known_nodes is not None
    fast, slow = harness.launcher.known_nodes
    harness.launcher.known_nodes = [replace(fast, leaving=True), slow]
    harness.step()
    assert harness.launcher.drained == ["a"]
    harness.launcher.known_nodes = [replace(fast, leaving=True, free={"CPU": 1.0}), slow]
    harness.step(a=Stopped(Node("fast", "fast"), Progress(40, 100, checkpoint_step=40)))
    assert harness.kinds() == {"a": Waiting, "b": Running, "c": Waiting}, "c waits for another such node"
    history = harness.controller.history("a")
    assert (history.past_attempts[0].cause, history.failures) == ("moved", 0)
    harness.launcher.known_nodes = [make_node("new"), slow]
    harness.step()
    assert harness.launcher.chosen_nodes["a"] == "new"
    assert harness.launcher.drained == ["a"]


def test_a_task_without_checkpoints_stays_on_a_leaving_node() -> None:
    harness = TwoNodesHarness(make_task("a", steps=0))
    harness.step()
    harness.step(a=Alive(Node("fast", "fast"), None))
    harness.launcher.known_nodes = [replace(make_node("fast"), leaving=True), make_node("slow")]
    harness.step()
    assert harness.launcher.drained == []
    harness.finish("a")
    assert harness.controller.outcome() == "finished"


def test_a_chosen_fallback_is_reported() -> None:
    needs = Needs(gpus=1, fallback=(Demand(cpus=1),))
    harness = TwoNodesHarness(replace(make_measurable_task("a"), needs=needs))
    harness.step()
    assert harness.launcher.names == ["a"]
    assert harness.controller.history("a").message == "no node can satisfy 1 CPU, 1 GPU: using fallback 1, 1 CPU"


# Resource requests that no living node can satisfy


def test_a_task_waits_while_the_only_node_for_it_is_away() -> None:
    needs = Needs(labels={"kind": "fast"})
    first, queued, child = (
        make_measurable_task("first"),
        make_measurable_task("queued", 80),
        make_task("child", "first"),
    )
    harness = TwoNodesHarness(*(replace(task, needs=needs) for task in (first, queued, child)))
    harness.step()
    harness.busy("fast")
    harness.step(first=Alive(Node("fast", "fast"), None))
    harness.launcher.known_nodes = [make_node("slow")]
    harness.finish("first")
    assert harness.kinds() == {"first": Committed, "queued": Retrying, "child": Retrying}
    harness.launcher.known_nodes = [make_node("fast"), make_node("slow")]
    harness.step()
    assert harness.launcher.names == ["first"], "nodes are not searched at every step"
    harness.now += policies.PLACEMENT_DELAY
    harness.step()
    assert sorted(harness.launcher.names) == ["child", "first", "queued"]


LONE_HEAD = NodeFacts("head", "head", "", {"CPU": 8.0, HEAD: 1.0}, {}, {"CPU": 8.0})


def test_a_new_head_waits_for_its_workers() -> None:
    harness = TwoNodesHarness(
        make_task("corpus"), replace(make_measurable_task("a"), needs=Needs(labels={"kind": "slow"}))
    )
    harness.launcher.known_nodes = [LONE_HEAD]
    harness.step()
    assert harness.kinds() == {"corpus": Placing, "a": Retrying}, "the head can run the corpus"
    assert harness.launcher.expected == [["a", "corpus"]], "an autoscaling cluster learns of both"
    harness.launcher.known_nodes = [LONE_HEAD, make_node("slow")]
    harness.now += policies.PLACEMENT_DELAY
    harness.step()
    assert harness.launcher.names == ["corpus", "a"]


def test_a_head_that_stays_alone_is_the_whole_cluster() -> None:
    harness = TwoNodesHarness(replace(make_measurable_task("a"), needs=Needs(gpus=1)))
    harness.launcher.known_nodes = [LONE_HEAD]
    harness.step()
    harness.now += JOIN_TIMEOUT
    with pytest.raises(
        PlacementError, match=r"no node can satisfy branches/a \(1 CPU, 1 GPU\); the cluster has 1 living node "
    ):
        harness.step()


def test_an_impossible_request_is_refused_before_anything_starts() -> None:
    tasks = [make_task("seed"), make_task("branch", "seed"), replace(make_task("mix", "branch"), needs=Needs(gpus=1))]
    harness = TwoNodesHarness(*tasks)
    with pytest.raises(
        PlacementError, match=r"no node can satisfy branches/mix \(1 CPU, 1 GPU\); the cluster has 2 living nodes "
    ):
        harness.step()
    assert harness.launcher.placed == []
    commit_task(harness.store, harness.tasks["mix"])
    after_commit = Controller(tasks, harness.store, harness.launcher)
    after_commit.step()
    assert harness.launcher.names == ["seed"], "a committed task needs no node"


def test_requests_are_checked_when_the_first_worker_joins_the_head() -> None:
    harness = TwoNodesHarness(replace(make_measurable_task("a"), needs=Needs(gpus=1)))
    harness.launcher.known_nodes = [LONE_HEAD]
    harness.step()
    harness.launcher.known_nodes.append(make_node("slow"))
    with pytest.raises(PlacementError, match=r"branches/a \(1 CPU, 1 GPU\)"):
        harness.step()


# Over threads
