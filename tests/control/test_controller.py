"""The controller over a scripted launcher (what it decides) and over threads (that it works)."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.control import policies
from bam_ray.control.controller import DRAIN_PATIENCE, MOVE_PATIENCE, Controller
from bam_ray.control.launcher import InProcessLauncher
from bam_ray.control.observations import Alive, Broke, Done, Stopped
from bam_ray.errors import DataError, Interrupted, PlacementError, StoreUnavailable
from bam_ray.pipeline.states import Blocked, Committed, Draining, Failed, Node, Placing, Retrying, Running, Waiting
from bam_ray.pipeline.tasks import Progress, StageContext, Task
from bam_ray.scheduling.feasibility import JOIN_PATIENCE
from bam_ray.scheduling.nodes import HEAD, NodeFacts
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


def test_children_are_placed_when_all_their_parents_are_committed() -> None:
    harness = ControllerHarness(make_task("a"), make_task("b"), make_task("c", "a", "b"))
    harness.step()
    assert harness.launcher.names == ["a", "b"]
    harness.finish("a")
    assert harness.launcher.names == ["a", "b"]
    harness.finish("b")
    assert harness.launcher.names == ["a", "b", "c"]
    harness.finish("c")
    assert harness.controller.outcome() == "finished"
    assert harness.launcher.statuses == {}, "what is done is freed"


def test_the_longest_are_placed_first() -> None:
    harness = ControllerHarness(make_task("short", steps=5), make_task("long", steps=50), make_task("middle", steps=20))
    harness.step()
    assert harness.launcher.names == ["long", "middle", "short"]


def test_not_more_than_a_bounded_number_wait_for_nodes() -> None:
    harness = ControllerHarness(*(make_task(f"t{i}", steps=i) for i in range(1000)))
    harness.step()
    assert len(harness.launcher.placed) == policies.MAX_PENDING
    harness.step(t999=Alive(NODE, None), t998=Alive(NODE, None))
    assert len(harness.launcher.placed) == policies.MAX_PENDING + 2
    assert harness.launcher.names == [f"t{i}" for i in range(999, 999 - policies.MAX_PENDING - 2, -1)]


def test_a_kind_can_be_worked_on_one_at_a_time() -> None:
    harness = ControllerHarness(
        *(replace(make_task(name), at_once=1) for name in "ab"), replace(make_task("c"), kind="seeds")
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


def test_an_error_is_retried_later_elsewhere_and_at_last_given_up() -> None:
    harness = ControllerHarness(make_task("a", attempts=3))
    harness.step()
    harness.step(a=Broke("boom", NODE))
    assert harness.kinds() == {"a": Retrying}
    harness.now += policies.FIRST_DELAY
    harness.step()
    assert harness.launcher.placed[-1] == ("a", frozenset({"1"}))
    harness.step(a=Broke("boom", Node("2", "two")))
    harness.now += policies.FIRST_DELAY
    harness.step()
    assert harness.kinds() == {"a": Retrying}, "the second delay is longer"
    harness.now += policies.FIRST_DELAY
    harness.step()
    assert harness.launcher.placed[-1] == ("a", frozenset({"1", "2"}))
    harness.step(a=Broke("boom", NODE, log=("line",)))
    state = harness.controller.states["a"]
    assert isinstance(state, Failed)
    assert (state.error, state.node, state.log) == ("boom (3 attempts)", NODE, ("line",))
    assert harness.controller.outcome() == "failed"


def test_an_attempt_that_got_further_is_not_counted_and_begins_the_count_anew() -> None:
    harness = ControllerHarness(make_task("a", attempts=2))
    for checkpoint in (2, 4, 6):
        harness.now += policies.LONGEST_DELAY
        harness.step()
        harness.step(a=Broke("boom", NODE, Progress(checkpoint, 10, checkpoint_step=checkpoint)))
        assert harness.controller.history("a").failures == 0
        harness.now += policies.LONGEST_DELAY
        harness.step()
        harness.step(a=Broke("boom", NODE))
        assert harness.kinds() == {"a": Retrying}, "the first that got no further"
    harness.now += policies.LONGEST_DELAY
    harness.step()
    harness.step(a=Broke("boom", NODE, Progress(6, 10, checkpoint_step=6)))
    assert harness.kinds() == {"a": Failed}


def test_nodes_that_die_are_no_fault_of_the_task_but_one_that_brings_them_down_ends() -> None:
    harness = ControllerHarness(make_task("a", attempts=2))
    harness.step()
    deaths = policies.MOST_NODE_DEATHS
    for count in range(1, deaths):
        harness.step(a=Broke("node died", Node(str(count), "spot"), node_fault=True))
        assert harness.kinds() == {"a": Placing}, "retried at once"
    assert harness.controller.history("a").failures == 0
    harness.step(a=Broke("node died", NODE, Progress(3, 10, checkpoint_step=3), node_fault=True))
    for _ in range(deaths):
        assert harness.kinds() == {"a": Placing}, "it had got further"
        harness.step(a=Broke("node died", NODE, node_fault=True))
    state = harness.controller.states["a"]
    assert isinstance(state, Failed)
    assert state.error == f"node died ({2 * deaths} attempts)"


def test_a_store_that_was_away_is_no_fault_of_task_or_node_but_not_waited_for_without_end() -> None:
    harness = ControllerHarness(make_task("a", attempts=2))
    away = Broke("no S3 server answers", NODE, store_fault=True)
    for count in range(1, policies.MOST_OUTAGES):
        harness.step()
        harness.step(a=away)
        assert harness.controller.history("a").outages == count
        harness.now += policies.LONGEST_DELAY
    assert harness.launcher.placed[-1] == ("a", frozenset()), "no node is avoided for it"
    harness.step()
    harness.step(a=Broke("boom", NODE))
    assert (harness.controller.history("a").outages, harness.controller.history("a").failures) == (0, 1)
    for _ in range(policies.MOST_OUTAGES):
        assert harness.kinds() == {"a": Retrying}
        harness.now += policies.LONGEST_DELAY
        harness.step()
        harness.step(a=away)
    assert harness.kinds() == {"a": Failed}


def test_one_failure_stops_only_what_is_made_from_it() -> None:
    harness = ControllerHarness(
        make_task("a"),
        make_task("b"),
        make_task("of_a", "a"),
        make_task("of_of_a", "of_a", "b"),
        make_task("of_b", "b"),
    )
    harness.step()
    harness.step(a=Broke("bad text", NODE, final=True))
    assert harness.kinds() == {"a": Failed, "b": Placing, "of_a": Blocked, "of_of_a": Blocked, "of_b": Waiting}
    blocked = harness.controller.states["of_of_a"]
    assert isinstance(blocked, Blocked)
    assert blocked.by == "branches/a"
    assert harness.controller.outcome() == "running"
    harness.finish("b")
    harness.finish("of_b")
    assert harness.controller.outcome() == "failed"


def test_ending_without_a_manifest_is_a_failure() -> None:
    harness = ControllerHarness(make_task("a", attempts=1))
    harness.step()
    harness.step(a=Done(NODE, None))
    state = harness.controller.states["a"]
    assert isinstance(state, Failed)
    assert "without a manifest" in state.error


def test_what_a_dying_node_committed_is_not_done_again() -> None:
    harness = ControllerHarness(make_task("a"))
    harness.step()
    commit_task(harness.store, harness.tasks["a"])
    harness.step(a=Broke("node died", NODE, node_fault=True))
    assert harness.controller.outcome() == "finished"
    assert harness.launcher.names == ["a"]


def test_a_store_that_is_away_for_a_moment_loses_nothing() -> None:
    harness = ControllerHarness(make_task("a"))
    harness.step()
    exists = harness.store.exists

    def away(key: str) -> bool:
        raise StoreUnavailable("gone")

    harness.store.exists = away  # type: ignore[method-assign]
    harness.step(a=Done(NODE, None))
    assert harness.controller.outcome() == "running"
    harness.store.exists = exists  # type: ignore[method-assign]
    harness.finish("a")
    assert harness.controller.outcome() == "finished"


def test_a_stop_drains_what_runs_and_places_nothing() -> None:
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


def test_a_task_that_does_not_hear_is_killed() -> None:
    harness = ControllerHarness(make_task("deaf"))
    harness.step()
    harness.step(deaf=Alive(NODE, None))
    harness.controller.stop()
    harness.step()
    harness.now += DRAIN_PATIENCE + 1
    harness.step()
    assert harness.controller.outcome() == "interrupted"
    assert harness.launcher.statuses == {}


def test_stopping_unasked_is_a_failure() -> None:
    harness = ControllerHarness(make_task("a", attempts=1))
    harness.step()
    harness.step(a=Stopped(NODE, None))
    assert harness.kinds() == {"a": Failed}


def test_eta_leaves_out_the_start_and_the_steps_of_earlier_attempts() -> None:
    harness = ControllerHarness(make_task("a", steps=100))
    harness.step()
    harness.step(a=Alive(NODE, None))
    harness.now = 50.0
    harness.step(a=Alive(NODE, Progress(40, 100)))
    assert harness.controller.eta("a") is None
    harness.now = 60.0
    harness.step(a=Alive(NODE, Progress(60, 100)))
    assert harness.controller.eta("a") == pytest.approx(20.0)


def test_changes_are_told() -> None:
    told: list[tuple[str, type]] = []
    launcher = ScriptedLauncher()
    task = make_task("a")
    controller = Controller(
        [task], MemoryStore(), launcher, on_change=lambda task, state: told.append((task.id, type(state)))
    )
    assert controller.step()
    assert not controller.step()
    launcher.statuses["a"] = Alive(NODE, Progress(1, 10))
    assert controller.step()
    launcher.statuses["a"] = Alive(NODE, Progress(2, 10))
    assert not controller.step(), "progress alone is no change of state"
    assert told == [("a", Placing), ("a", Running)]


# On nodes of which the launcher tells


class Nodes(ControllerHarness):
    """A controller on two nodes, of which `fast` makes ten steps a second and `slow` one."""

    def __init__(self, *tasks: Task) -> None:
        super().__init__(*tasks)
        self.launcher.known_nodes = [make_node("fast"), make_node("slow")]

    def busy(self, *names: str) -> None:
        self.launcher.known_nodes = [make_node(name, free=0.0 if name in names else 1.0) for name in ("fast", "slow")]

    def measure(self) -> None:
        """Let `a` and `b` start on the two nodes, and measure them."""
        self.step()
        self.busy("fast", "slow")
        on = {"a": Node("fast", "fast"), "b": Node("slow", "slow")}
        self.step(**{name: Alive(where, None) for name, where in on.items()})
        self.now = 1.0
        self.step(**{name: Alive(where, Progress(1, 100)) for name, where in on.items()})
        self.now = 4.0
        self.step(a=Alive(on["a"], Progress(31, 100)), b=Alive(on["b"], Progress(4, 100)))


def test_where_nothing_is_measured_as_many_are_placed_as_fit() -> None:
    harness = Nodes(make_measurable_task("a"), make_measurable_task("b", 90), make_measurable_task("c", 80))
    harness.step()
    assert harness.launcher.chosen_nodes == {"a": None, "b": None}
    assert harness.launcher.expected == [["a", "b", "c"]], "a cluster that grows hears of all three"


def test_the_longest_waits_for_the_fastest_node_once_speeds_are_known() -> None:
    harness = Nodes(
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


def test_a_task_moves_to_a_faster_node_that_falls_free_and_goes_on_there() -> None:
    harness = Nodes(make_measurable_task("a"), make_measurable_task("b"))
    harness.measure()
    slow = Node("slow", "slow")
    harness.now = 12.0
    harness.busy("slow")
    harness.controller.speeds.saw_checkpoint(("dense", "1 CPU"), 1.0)
    commit_task(harness.store, harness.tasks["a"])
    harness.step(a=Done(Node("fast", "fast"), Progress(100, 100)), b=Alive(slow, Progress(12, 100)))
    assert harness.kinds() == {"a": Committed, "b": Draining}
    assert harness.launcher.drained == ["b"]
    harness.now = 13.0
    harness.busy()
    harness.step(b=Stopped(slow, Progress(13, 100, checkpoint_step=13)))
    assert harness.launcher.chosen_nodes["b"] == "fast"
    assert harness.controller.history("b").ended[0].cause == "moved"
    harness.busy("fast")
    harness.step(b=Alive(Node("fast", "fast"), None))
    state = harness.controller.states["b"]
    assert isinstance(state, Running)
    assert state.progress.step == 13, "shown where it stands while it reads its checkpoint"
    assert harness.controller.eta("b") == pytest.approx(8.7), "at the speed that was measured there"
    assert harness.controller.history("b").failures == 0


def test_a_task_that_does_not_hear_that_it_should_move_is_killed_at_last() -> None:
    harness = Nodes(make_measurable_task("a"), make_measurable_task("b"))
    harness.measure()
    harness.now = 12.0
    harness.busy("slow")
    commit_task(harness.store, harness.tasks["a"])
    deaf = Alive(Node("slow", "slow"), Progress(12, 100))
    harness.controller.speeds.saw_checkpoint(("dense", "1 CPU"), 1.0)
    harness.step(a=Done(Node("fast", "fast"), Progress(100, 100)), b=deaf)
    harness.now += DRAIN_PATIENCE + 1
    harness.step(b=deaf)
    assert harness.kinds()["b"] is Draining, "a large checkpoint may take longer than a run that stops would wait"
    harness.now += MOVE_PATIENCE
    harness.step(b=deaf)
    assert harness.launcher.chosen_nodes["b"] == "fast"


def test_what_was_meant_for_a_node_that_is_gone_or_deaf_is_placed_again() -> None:
    harness = Nodes(make_measurable_task("a"), make_measurable_task("b"), make_measurable_task("c", 80))
    harness.measure()
    harness.busy("slow")
    harness.finish("a")
    assert harness.launcher.chosen_nodes["c"] == "fast"
    harness.launcher.known_nodes = [make_node("fast-again"), make_node("slow", free=0.0)]
    harness.step()
    assert harness.launcher.chosen_nodes["c"] == "fast-again"
    harness.now += policies.PIN_PATIENCE + 1
    harness.step()
    assert harness.launcher.names.count("c") == 3, "it was not taken for too long: placed again"


def test_a_node_that_will_be_taken_away_is_left_in_time_and_given_nothing() -> None:
    harness = Nodes(
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
    assert harness.kinds() == {"a": Waiting, "b": Running, "c": Waiting}, "c may yet be met, but not there"
    assert (harness.controller.history("a").ended[0].cause, harness.controller.history("a").failures) == ("moved", 0)
    harness.launcher.known_nodes = [make_node("new"), slow]
    harness.step()
    assert harness.launcher.chosen_nodes["a"] == "new"
    assert harness.launcher.drained == ["a"]


def test_work_without_checkpoints_stays_where_a_node_is_leaving() -> None:
    harness = Nodes(make_task("a", steps=0))
    harness.step()
    harness.step(a=Alive(Node("fast", "fast"), None))
    harness.launcher.known_nodes = [replace(make_node("fast"), leaving=True), make_node("slow")]
    harness.step()
    assert harness.launcher.drained == []
    harness.finish("a")
    assert harness.controller.outcome() == "finished"


def test_a_fallback_is_taken_and_said() -> None:
    needs = Needs(gpus=1, fallback=(Demand(cpus=1),))
    harness = Nodes(replace(make_measurable_task("a"), needs=needs))
    harness.step()
    assert harness.launcher.names == ["a"]
    assert harness.controller.history("a").said == "no node can give 1 CPU, 1 GPU: took fallback 1, 1 CPU"


# Demands that no living node meets


def test_what_is_queued_waits_while_the_only_node_for_it_is_away() -> None:
    needs = Needs(labels={"kind": "fast"})
    first, queued, child = (
        make_measurable_task("first"),
        make_measurable_task("queued", 80),
        make_task("child", "first"),
    )
    harness = Nodes(*(replace(task, needs=needs) for task in (first, queued, child)))
    harness.step()
    harness.busy("fast")
    harness.step(first=Alive(Node("fast", "fast"), None))
    harness.launcher.known_nodes = [make_node("slow")]
    harness.finish("first")
    assert harness.kinds() == {"first": Committed, "queued": Retrying, "child": Retrying}
    harness.launcher.known_nodes = [make_node("fast"), make_node("slow")]
    harness.step()
    assert harness.launcher.names == ["first"], "not looked for at every step"
    harness.now += policies.PLACEMENT_DELAY
    harness.step()
    assert sorted(harness.launcher.names) == ["child", "first", "queued"]


LONE_HEAD = NodeFacts("head", "head", "", {"CPU": 8.0, HEAD: 1.0}, {}, {"CPU": 8.0})


def test_a_head_that_was_just_begun_waits_for_its_workers() -> None:
    harness = Nodes(make_task("corpus"), replace(make_measurable_task("a"), needs=Needs(labels={"kind": "slow"})))
    harness.launcher.known_nodes = [LONE_HEAD]
    harness.step()
    assert harness.kinds() == {"corpus": Placing, "a": Retrying}, "the head can do something"
    assert harness.launcher.expected == [["a", "corpus"]], "a cluster that grows on demand hears of it"
    harness.launcher.known_nodes = [LONE_HEAD, make_node("slow")]
    harness.now += policies.PLACEMENT_DELAY
    harness.step()
    assert harness.launcher.names == ["corpus", "a"]


def test_a_head_that_stays_alone_is_all_there_is() -> None:
    harness = Nodes(replace(make_measurable_task("a"), needs=Needs(gpus=1)))
    harness.launcher.known_nodes = [LONE_HEAD]
    harness.step()
    harness.now += JOIN_PATIENCE
    with pytest.raises(PlacementError, match="branches/a needs 1 CPU, 1 GPU, which the 1 living nodes can never give"):
        harness.step()


def test_a_demand_that_can_never_be_met_is_refused_before_anything_begins() -> None:
    story = [make_task("seed"), make_task("branch", "seed"), replace(make_task("mix", "branch"), needs=Needs(gpus=1))]
    harness = Nodes(*story)
    with pytest.raises(
        PlacementError, match="branches/mix needs 1 CPU, 1 GPU, which the 2 living nodes can never give"
    ):
        harness.step()
    assert harness.launcher.placed == []
    commit_task(harness.store, harness.tasks["mix"])
    done = Controller(story, harness.store, harness.launcher)
    done.step()
    assert harness.launcher.names == ["seed"], "what is committed needs nothing"


def test_a_demand_is_checked_against_the_first_workers_where_a_head_came_alone() -> None:
    harness = Nodes(replace(make_measurable_task("a"), needs=Needs(gpus=1)))
    harness.launcher.known_nodes = [LONE_HEAD]
    harness.step()
    harness.launcher.known_nodes.append(make_node("slow"))
    with pytest.raises(PlacementError, match="branches/a needs 1 CPU, 1 GPU"):
        harness.step()


# Over real threads


def in_threads(
    tasks: list[Task], store: MemoryStore, work: Callable[[Task, StageContext], None], slots: int = 2
) -> Controller:
    return Controller(tasks, store, InProcessLauncher(work, slots))


def test_threads_run_a_graph_in_parallel() -> None:
    store = MemoryStore()
    together = threading.Barrier(2, timeout=5)

    def work(task: Task, context: StageContext) -> None:
        if task.name in ("b", "c"):
            together.wait()  # passes only if both run at once
        context.report(Progress(10, 10, loss=1.0))
        commit_task(store, task)

    controller = in_threads(
        [make_task("a"), make_task("b", "a"), make_task("c", "a"), make_task("d", "b", "c")], store, work
    )
    assert controller.run(pause=0.001) == "finished"
    assert cast(Committed, controller.states["d"]).progress == Progress(10, 10, loss=1.0)


def test_threads_keep_to_their_slots() -> None:
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


def test_errors_of_threads_carry_their_type_and_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "FIRST_DELAY", 0.001)
    begun: list[str] = []

    def work(task: Task, context: StageContext) -> None:
        begun.append(task.name)
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
    assert sorted(begun) == ["bug", "bug", "own"]


def test_work_that_the_store_was_away_for_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_run_that_was_stopped_goes_on_where_it_stood() -> None:
    store = MemoryStore()
    steps: dict[str, int] = {}  # stands for step checkpoints
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
