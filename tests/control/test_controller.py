"""The decisions of the controller over a scripted launcher, and whole runs over threads."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import cast

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control import policies
from bam_ray.control.controller import Controller
from bam_ray.control.launcher import InProcessLauncher
from bam_ray.control.observations import Alive, Crashed, Done, Stopped
from bam_ray.control.transitions import Free, Launch, Transition, changed_tasks
from bam_ray.errors import DataError, Interrupted, PlacementError, StoreUnavailable
from bam_ray.pipeline.drain_policies import DrainRequest
from bam_ray.pipeline.states import (
    Blocked,
    Committed,
    Draining,
    Failed,
    Node,
    Placing,
    Retrying,
    Running,
    State,
    Waiting,
)
from bam_ray.pipeline.tasks import Progress, StageContext, Task
from bam_ray.scheduling.feasibility import JOIN_TIMEOUT
from bam_ray.scheduling.nodes import HEAD, NodeFacts
from bam_ray.scheduling.placement import MAX_PENDING
from bam_ray.settings import Demand, Needs
from tests.support.control.scripted_launcher import (
    NODE,
    ControllerHarness,
    ScriptedLauncher,
    commit_task,
    make_measurable_task,
    make_node,
    make_task,
)


def test_a_task_starts_when_all_its_parents_are_committed() -> None:
    harness = ControllerHarness(make_task("a"), make_task("b"), make_task("c", "a", "b"))
    harness.step()
    assert harness.launcher.names == ["a", "b"]
    harness.finish("a")
    assert harness.launcher.names == ["a", "b"]
    harness.finish("b")
    assert harness.launcher.names == ["a", "b", "c"]
    harness.finish("c")
    assert harness.controller.outcome() == "finished"
    assert harness.launcher.statuses == {}, "finished attempts are freed"


def test_the_longest_tasks_are_placed_first() -> None:
    harness = ControllerHarness(make_task("short", steps=5), make_task("long", steps=50), make_task("middle", steps=20))
    harness.step()
    assert harness.launcher.names == ["long", "middle", "short"]


def test_the_queue_of_the_launcher_is_bounded() -> None:
    harness = ControllerHarness(*(make_task(f"t{i}", steps=i) for i in range(1000)))
    harness.step()
    assert len(harness.launcher.placed) == MAX_PENDING
    harness.step(t999=Alive(NODE, None), t998=Alive(NODE, None))
    assert len(harness.launcher.placed) == MAX_PENDING + 2
    assert harness.launcher.names == [f"t{i}" for i in range(999, 999 - MAX_PENDING - 2, -1)]


def test_at_once_limits_the_active_tasks_of_a_kind() -> None:
    harness = ControllerHarness(
        *(replace(make_task(name), at_once=1) for name in "ab"), replace(make_task("c"), kind=ArtifactKind.SEEDS)
    )
    harness.step()
    assert harness.launcher.names == ["a", "c"]
    harness.step(a=Alive(NODE, Progress(1, 10)))
    assert harness.launcher.names == ["a", "c"]
    harness.finish("a")
    harness.step()
    assert harness.launcher.names == ["a", "c", "b"]


def test_committed_tasks_are_skipped_at_the_start() -> None:
    harness = ControllerHarness(make_task("a"), make_task("b", "a"), committed=("a",))
    assert harness.kinds() == {"a": Committed, "b": Waiting}
    harness.step()
    assert harness.launcher.names == ["b"]


def test_errors_are_retried_on_other_nodes_until_attempts_run_out() -> None:
    harness = ControllerHarness(make_task("a", attempts=3))
    harness.step()
    harness.step(a=Crashed("boom", NODE))
    assert harness.kinds() == {"a": Retrying}
    harness.now += policies.FIRST_DELAY
    harness.step()
    assert harness.launcher.placed[-1] == ("a", frozenset({"1"}))
    harness.step(a=Crashed("boom", Node("2", "two")))
    harness.now += policies.FIRST_DELAY
    harness.step()
    assert harness.kinds() == {"a": Retrying}, "the second delay is longer"
    harness.now += policies.FIRST_DELAY
    harness.step()
    assert harness.launcher.placed[-1] == ("a", frozenset({"1", "2"}))
    harness.step(a=Crashed("boom", NODE, log=("line",)))
    state = harness.controller.states["a"]
    assert isinstance(state, Failed)
    assert (state.error, state.node, state.log) == ("boom (3 attempts)", NODE, ("line",))
    assert harness.controller.outcome() == "failed"


def test_an_advanced_checkpoint_resets_the_failure_count() -> None:
    harness = ControllerHarness(make_task("a", attempts=2))
    for checkpoint in (2, 4, 6):
        harness.now += policies.LONGEST_DELAY
        harness.step()
        harness.step(a=Crashed("boom", NODE, Progress(checkpoint, 10, checkpoint_step=checkpoint)))
        assert harness.controller.history("a").failures == 0
        harness.now += policies.LONGEST_DELAY
        harness.step()
        harness.step(a=Crashed("boom", NODE))
        assert harness.kinds() == {"a": Retrying}, "the first attempt without an advance"
    harness.now += policies.LONGEST_DELAY
    harness.step()
    harness.step(a=Crashed("boom", NODE, Progress(6, 10, checkpoint_step=6)))
    assert harness.kinds() == {"a": Failed}


def test_node_deaths_are_not_failures_but_are_limited() -> None:
    harness = ControllerHarness(make_task("a", attempts=2))
    harness.step()
    deaths = policies.MOST_NODE_DEATHS
    for count in range(1, deaths):
        harness.step(a=Crashed("node died", Node(str(count), "spot"), node_fault=True))
        assert harness.kinds() == {"a": Placing}, "retried at once"
    assert harness.controller.history("a").failures == 0
    harness.step(a=Crashed("node died", NODE, Progress(3, 10, checkpoint_step=3), node_fault=True))
    for _ in range(deaths):
        assert harness.kinds() == {"a": Placing}, "the checkpoint had advanced"
        harness.step(a=Crashed("node died", NODE, node_fault=True))
    state = harness.controller.states["a"]
    assert isinstance(state, Failed)
    assert state.error == f"node died ({2 * deaths} attempts)"


def test_outages_of_the_store_are_not_failures_but_are_limited() -> None:
    harness = ControllerHarness(make_task("a", attempts=2))
    outage = Crashed("no S3 server answers", NODE, store_fault=True)
    for count in range(1, policies.MOST_OUTAGES):
        harness.step()
        harness.step(a=outage)
        assert harness.controller.history("a").outages == count
        harness.now += policies.LONGEST_DELAY
    assert harness.launcher.placed[-1] == ("a", frozenset()), "an outage marks no node to avoid"
    harness.step()
    harness.step(a=Crashed("boom", NODE))
    assert (harness.controller.history("a").outages, harness.controller.history("a").failures) == (0, 1)
    for _ in range(policies.MOST_OUTAGES):
        assert harness.kinds() == {"a": Retrying}
        harness.now += policies.LONGEST_DELAY
        harness.step()
        harness.step(a=outage)
    assert harness.kinds() == {"a": Failed}


def test_a_failure_blocks_only_the_tasks_made_from_it() -> None:
    harness = ControllerHarness(
        make_task("a"),
        make_task("b"),
        make_task("of_a", "a"),
        make_task("of_of_a", "of_a", "b"),
        make_task("of_b", "b"),
    )
    harness.step()
    harness.step(a=Crashed("bad text", NODE, final=True))
    assert harness.kinds() == {"a": Failed, "b": Placing, "of_a": Blocked, "of_of_a": Blocked, "of_b": Waiting}
    blocked = harness.controller.states["of_of_a"]
    assert isinstance(blocked, Blocked)
    assert blocked.by == "branches/a"
    assert harness.controller.outcome() == "running"
    harness.finish("b")
    harness.finish("of_b")
    assert harness.controller.outcome() == "failed"


def test_an_attempt_without_a_manifest_has_failed() -> None:
    harness = ControllerHarness(make_task("a", attempts=1))
    harness.step()
    harness.step(a=Done(NODE, None))
    state = harness.controller.states["a"]
    assert isinstance(state, Failed)
    assert "without a manifest" in state.error


def test_a_commit_of_a_dying_node_counts() -> None:
    harness = ControllerHarness(make_task("a"))
    harness.step()
    commit_task(harness.store, harness.tasks["a"])
    harness.step(a=Crashed("node died", NODE, node_fault=True))
    assert harness.controller.outcome() == "finished"
    assert harness.launcher.names == ["a"]


def test_a_short_outage_of_the_store_loses_nothing() -> None:
    harness = ControllerHarness(make_task("a"))
    harness.step()
    exists = harness.store.exists

    def unavailable(key: str) -> bool:
        raise StoreUnavailable("gone")

    harness.store.exists = unavailable  # type: ignore[method-assign]
    harness.step(a=Done(NODE, None))
    assert harness.controller.outcome() == "running"
    harness.store.exists = exists  # type: ignore[method-assign]
    harness.finish("a")
    assert harness.controller.outcome() == "finished"


def test_stop_drains_running_tasks_and_places_none() -> None:
    harness = ControllerHarness(make_task("runs"), make_task("queued"), make_task("child", "runs"))
    harness.step()
    harness.step(runs=Alive(NODE, Progress(3, 10)))
    harness.controller.stop()
    harness.step()
    assert harness.kinds() == {"runs": Draining, "queued": Waiting, "child": Waiting}
    assert harness.launcher.drained == ["runs"]
    assert harness.controller.outcome() == "running"
    harness.step(runs=Stopped(NODE, Progress(4, 10, checkpoint_step=4)))
    assert harness.controller.outcome() == "interrupted"
    assert harness.launcher.statuses == {}
    assert len(harness.launcher.placed) == 2


def test_a_task_that_does_not_stop_in_time_is_killed() -> None:
    harness = ControllerHarness(make_task("stuck"))
    harness.step()
    harness.step(stuck=Alive(NODE, None))
    harness.controller.stop()
    harness.step()
    harness.now += policies.STOP_TIMEOUT + 1
    harness.step()
    assert harness.controller.outcome() == "interrupted"
    assert harness.launcher.statuses == {}


def test_stopping_without_being_asked_is_a_failure() -> None:
    harness = ControllerHarness(make_task("a", attempts=1))
    harness.step()
    harness.step(a=Stopped(NODE, None))
    assert harness.kinds() == {"a": Failed}


def test_eta_excludes_the_start_and_the_steps_of_earlier_attempts() -> None:
    harness = ControllerHarness(make_task("a", steps=100))
    harness.step()
    harness.step(a=Alive(NODE, None))
    harness.now = 50.0
    harness.step(a=Alive(NODE, Progress(40, 100)))
    assert harness.controller.eta("a") is None
    harness.now = 60.0
    harness.step(a=Alive(NODE, Progress(60, 100)))
    assert harness.controller.eta("a") == pytest.approx(20.0)


def test_a_step_returns_its_transitions() -> None:
    reported: list[Transition] = []
    launcher = ScriptedLauncher()
    controller = Controller([make_task("a")], MemoryStore(), launcher, on_transition=reported.append)
    placed = controller.step()
    assert [(each.task_id, each.previous.label, each.state.label) for each in placed] == [("a", "waiting", "placing")]
    assert not controller.step()
    launcher.statuses["a"] = Alive(NODE, Progress(1, 10))
    running = controller.step()
    assert [(each.previous.label, each.state.label) for each in running] == [("placing", "running")]
    launcher.statuses["a"] = Alive(NODE, Progress(2, 10))
    assert not controller.step(), "progress alone is no transition"
    assert [each.state.label for each in reported] == ["placing", "running"]
    assert reported == [*placed, *running], "the callback receives the same values"


def test_transitions_of_one_step_are_in_order_and_have_reasons() -> None:
    harness = ControllerHarness(make_task("a"), make_task("b", "a"))
    harness.step()
    transitions = harness.step(a=Crashed("node died", NODE, node_fault=True))
    assert [(each.state.label, each.reason) for each in transitions] == [
        ("retrying", "node died"),
        ("placing", "the task is ready"),
    ]
    assert isinstance(transitions[0].action, Free)
    launch = transitions[1].action
    assert isinstance(launch, Launch)
    assert (launch.placed.attempt, launch.avoid) == (2, frozenset({"1"}))
    assert changed_tasks(transitions) == [], "the task is in the launcher's queue as before"
    failed = harness.step(a=Crashed("bad text", NODE, final=True))
    assert [(each.task_id, each.reason) for each in failed] == [("a", "bad text"), ("b", "branches/a failed")]
    assert changed_tasks(failed) == ["a", "b"]


def test_a_registered_policy_drains_a_running_attempt() -> None:
    def drain_at_step_5(tasks: Mapping[str, Task], states: Mapping[str, State]) -> Iterator[DrainRequest]:
        for task_id, state in states.items():
            if isinstance(state, Running) and state.progress.step == 5:
                yield DrainRequest(task_id, "step 5")

    launcher = ScriptedLauncher()
    task = make_task("a")
    controller = Controller([task], MemoryStore(), launcher, drain_policies=[drain_at_step_5])
    controller.step()
    for step in (4, 5):
        assert launcher.drained == []
        launcher.statuses["a"] = Alive(NODE, Progress(step, 10))
        controller.step()
    assert launcher.drained == ["a"]
    launcher.statuses["a"] = Stopped(NODE, Progress(5, 10, checkpoint_step=5))
    controller.step()
    assert (controller.history("a").past_attempts[0].cause, controller.attempts("a")) == ("step 5", 2)


# On known nodes


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


def in_threads(
    tasks: list[Task], store: MemoryStore, work: Callable[[Task, StageContext], None], slots: int = 2
) -> Controller:
    """Return a controller that runs `work` on threads."""
    return Controller(tasks, store, InProcessLauncher(work, slots))


def test_threads_run_a_graph_in_parallel() -> None:
    store = MemoryStore()
    together = threading.Barrier(2, timeout=5)

    def work(task: Task, context: StageContext) -> None:
        if task.name in ("b", "c"):
            together.wait()  # passes only if both run at the same time
        context.report(Progress(10, 10, loss=1.0))
        commit_task(store, task)

    controller = in_threads(
        [make_task("a"), make_task("b", "a"), make_task("c", "a"), make_task("d", "b", "c")], store, work
    )
    assert controller.run(pause=0.001) == "finished"
    assert cast(Committed, controller.states["d"]).progress == Progress(10, 10, loss=1.0)


def test_slots_limit_the_running_threads() -> None:
    store = MemoryStore()
    running = 0
    most = 0
    lock = threading.Lock()

    def work(task: Task, context: StageContext) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        commit_task(store, task)

    assert in_threads([make_task(f"t{i}") for i in range(6)], store, work, slots=2).run(pause=0.001) == "finished"
    assert most == 2


def test_errors_of_threads_have_a_type_and_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "FIRST_DELAY", 0.001)
    started: list[str] = []

    def work(task: Task, context: StageContext) -> None:
        started.append(task.name)
        if task.name == "own":
            raise DataError("corpus is empty")
        raise ZeroDivisionError("by zero")

    controller = in_threads([make_task("own"), make_task("bug", attempts=2)], MemoryStore(), work)
    assert controller.run(pause=0.001) == "failed"
    own, bug = (cast(Failed, controller.states[name]) for name in ("own", "bug"))
    assert own.error == "corpus is empty"
    assert own.log == ()
    assert bug.error == "ZeroDivisionError: by zero (2 attempts)"
    assert any("in work" in line for line in bug.log)
    assert sorted(started) == ["bug", "bug", "own"]


def test_outages_in_threads_are_not_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "FIRST_DELAY", 0.001)
    store, tries = MemoryStore(), 0

    def work(task: Task, context: StageContext) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise StoreUnavailable("the checkpoint of step 4 could not be written: no S3 server answers")
        commit_task(store, task)

    controller = in_threads([make_task("a", attempts=1)], store, work)
    assert controller.run(pause=0.001) == "finished"
    assert (tries, controller.history("a").failures) == (4, 0)


def test_a_stopped_run_resumes_at_its_last_step() -> None:
    store = MemoryStore()
    steps: dict[str, int] = {}  # the checkpoints
    first = threading.Event()

    def work(task: Task, context: StageContext) -> None:
        for step in range(steps.get(task.name, 0), 200):
            if context.should_stop():
                raise Interrupted("stopped")
            steps[task.name] = step + 1
            context.report(Progress(step + 1, 200, checkpoint_step=step + 1))
            if step == 5:
                first.set()
            time.sleep(0.0005)
        commit_task(store, task)

    tasks = [make_task("a", steps=200), make_task("b", "a", steps=200)]
    controller = in_threads(tasks, store, work)

    def stop_when_it_runs() -> None:
        first.wait()
        controller.stop()

    threading.Thread(target=stop_when_it_runs).start()
    assert controller.run(pause=0.001) == "interrupted"
    reached = steps["a"]
    assert 0 < reached < 200
    assert in_threads(tasks, store, work).run(pause=0.001) == "finished"
    assert steps == {"a": 200, "b": 200}
