"""The controller over a scripted launcher (what it decides) and over threads (that it works)."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.control import policies
from bam_ray.control.controller import DRAIN_PATIENCE, MOVE_PATIENCE, Controller
from bam_ray.control.launcher import InProcessLauncher
from bam_ray.control.observations import Alive, Broke, Done, Queued, Sighting, Stopped
from bam_ray.errors import DataError, Interrupted, PlacementError, StoreUnavailable
from bam_ray.pipeline.states import Blocked, Committed, Draining, Failed, Node, Placing, Retrying, Running, Waiting
from bam_ray.pipeline.tasks import Progress, StageContext, Task
from bam_ray.scheduling.feasibility import JOIN_PATIENCE
from bam_ray.scheduling.nodes import HEAD, NodeFacts
from bam_ray.settings import Demand, Needs

HERE = Node("1", "one")


def make(name: str, *parents: str, steps: int = 10, attempts: int = 4) -> Task:
    return Task("branches", name, name, parents, Needs(), total_steps=steps, max_attempts=attempts)


def commit(store: MemoryStore, task: Task) -> None:
    Artifact(store, task.kind, task.id).commit(Manifest(id=task.id, kind=task.kind, name=task.name))


class Script:
    """A launcher that sees what a test tells it to see."""

    def __init__(self) -> None:
        self.sightings: dict[str, Sighting] = {}
        self.placed: list[tuple[str, frozenset[str]]] = []
        self.drained: list[str] = []
        self.there: list[NodeFacts] | None = None  # None: this launcher chooses among its own
        self.meant_for: dict[str, str | None] = {}
        self.expected: list[list[str]] = []

    def nodes(self) -> list[NodeFacts] | None:
        return self.there

    def expect(self, tasks: Sequence[Task]) -> None:
        self.expected.append([task.id for task in tasks])

    def place(self, task: Task, avoid: frozenset[str], node_id: str | None = None) -> None:
        assert task.id not in self.sightings, "two attempts at once"
        self.placed.append((task.id, avoid))
        self.meant_for[task.id] = node_id
        self.sightings[task.id] = Queued()

    def poll(self) -> dict[str, Sighting]:
        return dict(self.sightings)

    def drain(self, task_id: str) -> None:
        self.drained.append(task_id)

    def free(self, task_id: str) -> None:
        del self.sightings[task_id]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.placed]


class Scene:
    """A controller over a script, with a clock that a test turns."""

    def __init__(self, *tasks: Task, committed: tuple[str, ...] = ()) -> None:
        self.now = 0.0
        self.store = MemoryStore()
        self.script = Script()
        self.tasks = {task.id: task for task in tasks}
        for name in committed:
            commit(self.store, self.tasks[name])
        self.controller = Controller(tasks, self.store, self.script, clock=lambda: self.now)

    def step(self, **sightings: Sighting) -> bool:
        self.script.sightings.update(sightings)
        return self.controller.step()

    def finish(self, name: str) -> None:
        commit(self.store, self.tasks[name])
        self.step(**{name: Done(HERE, Progress(10, 10))})

    def kinds(self) -> dict[str, type]:
        return {name: type(state) for name, state in self.controller.states.items()}


def test_children_are_placed_when_all_their_parents_are_committed() -> None:
    scene = Scene(make("a"), make("b"), make("c", "a", "b"))
    scene.step()
    assert scene.script.names == ["a", "b"]
    scene.finish("a")
    assert scene.script.names == ["a", "b"]
    scene.finish("b")
    assert scene.script.names == ["a", "b", "c"]
    scene.finish("c")
    assert scene.controller.outcome() == "finished"
    assert scene.script.sightings == {}, "what is done is freed"


def test_the_longest_are_placed_first() -> None:
    scene = Scene(make("short", steps=5), make("long", steps=50), make("middle", steps=20))
    scene.step()
    assert scene.script.names == ["long", "middle", "short"]


def test_not_more_than_a_bounded_number_wait_for_nodes() -> None:
    scene = Scene(*(make(f"t{i}", steps=i) for i in range(1000)))
    scene.step()
    assert len(scene.script.placed) == policies.MAX_PENDING
    scene.step(t999=Alive(HERE, None), t998=Alive(HERE, None))
    assert len(scene.script.placed) == policies.MAX_PENDING + 2
    assert scene.script.names == [f"t{i}" for i in range(999, 999 - policies.MAX_PENDING - 2, -1)]


def test_a_kind_can_be_worked_on_one_at_a_time() -> None:
    scene = Scene(*(replace(make(name), at_once=1) for name in "ab"), replace(make("c"), kind="seeds"))
    scene.step()
    assert scene.script.names == ["a", "c"]
    scene.step(a=Alive(HERE, Progress(1, 10)))
    assert scene.script.names == ["a", "c"]
    scene.finish("a")
    scene.step()
    assert scene.script.names == ["a", "c", "b"]


def test_committed_tasks_are_skipped_at_the_start() -> None:
    scene = Scene(make("a"), make("b", "a"), committed=("a",))
    assert scene.kinds() == {"a": Committed, "b": Waiting}
    scene.step()
    assert scene.script.names == ["b"]


def test_an_error_is_retried_later_elsewhere_and_at_last_given_up() -> None:
    scene = Scene(make("a", attempts=3))
    scene.step()
    scene.step(a=Broke("boom", HERE))
    assert scene.kinds() == {"a": Retrying}
    scene.now += policies.FIRST_DELAY
    scene.step()
    assert scene.script.placed[-1] == ("a", frozenset({"1"}))
    scene.step(a=Broke("boom", Node("2", "two")))
    scene.now += policies.FIRST_DELAY
    scene.step()
    assert scene.kinds() == {"a": Retrying}, "the second delay is longer"
    scene.now += policies.FIRST_DELAY
    scene.step()
    assert scene.script.placed[-1] == ("a", frozenset({"1", "2"}))
    scene.step(a=Broke("boom", HERE, log=("line",)))
    state = scene.controller.states["a"]
    assert isinstance(state, Failed)
    assert (state.error, state.node, state.log) == ("boom (3 attempts)", HERE, ("line",))
    assert scene.controller.outcome() == "failed"


def test_an_attempt_that_got_further_is_not_counted_and_begins_the_count_anew() -> None:
    scene = Scene(make("a", attempts=2))
    for checkpoint in (2, 4, 6):
        scene.now += policies.LONGEST_DELAY
        scene.step()
        scene.step(a=Broke("boom", HERE, Progress(checkpoint, 10, checkpoint_step=checkpoint)))
        assert scene.controller.history("a").failures == 0
        scene.now += policies.LONGEST_DELAY
        scene.step()
        scene.step(a=Broke("boom", HERE))
        assert scene.kinds() == {"a": Retrying}, "the first that got no further"
    scene.now += policies.LONGEST_DELAY
    scene.step()
    scene.step(a=Broke("boom", HERE, Progress(6, 10, checkpoint_step=6)))
    assert scene.kinds() == {"a": Failed}


def test_nodes_that_die_are_no_fault_of_the_task_but_one_that_brings_them_down_ends() -> None:
    scene = Scene(make("a", attempts=2))
    scene.step()
    deaths = policies.MOST_NODE_DEATHS
    for count in range(1, deaths):
        scene.step(a=Broke("node died", Node(str(count), "spot"), node_fault=True))
        assert scene.kinds() == {"a": Placing}, "retried at once"
    assert scene.controller.history("a").failures == 0
    scene.step(a=Broke("node died", HERE, Progress(3, 10, checkpoint_step=3), node_fault=True))
    for _ in range(deaths):
        assert scene.kinds() == {"a": Placing}, "it had got further"
        scene.step(a=Broke("node died", HERE, node_fault=True))
    state = scene.controller.states["a"]
    assert isinstance(state, Failed)
    assert state.error == f"node died ({2 * deaths} attempts)"


def test_a_store_that_was_away_is_no_fault_of_task_or_node_but_not_waited_for_without_end() -> None:
    scene = Scene(make("a", attempts=2))
    away = Broke("no S3 server answers", HERE, store_fault=True)
    for count in range(1, policies.MOST_OUTAGES):
        scene.step()
        scene.step(a=away)
        assert scene.controller.history("a").outages == count
        scene.now += policies.LONGEST_DELAY
    assert scene.script.placed[-1] == ("a", frozenset()), "no node is avoided for it"
    scene.step()
    scene.step(a=Broke("boom", HERE))
    assert (scene.controller.history("a").outages, scene.controller.history("a").failures) == (0, 1)
    for _ in range(policies.MOST_OUTAGES):
        assert scene.kinds() == {"a": Retrying}
        scene.now += policies.LONGEST_DELAY
        scene.step()
        scene.step(a=away)
    assert scene.kinds() == {"a": Failed}


def test_one_failure_stops_only_what_is_made_from_it() -> None:
    scene = Scene(make("a"), make("b"), make("of_a", "a"), make("of_of_a", "of_a", "b"), make("of_b", "b"))
    scene.step()
    scene.step(a=Broke("bad text", HERE, final=True))
    assert scene.kinds() == {"a": Failed, "b": Placing, "of_a": Blocked, "of_of_a": Blocked, "of_b": Waiting}
    blocked = scene.controller.states["of_of_a"]
    assert isinstance(blocked, Blocked)
    assert blocked.by == "branches/a"
    assert scene.controller.outcome() == "running"
    scene.finish("b")
    scene.finish("of_b")
    assert scene.controller.outcome() == "failed"


def test_ending_without_a_manifest_is_a_failure() -> None:
    scene = Scene(make("a", attempts=1))
    scene.step()
    scene.step(a=Done(HERE, None))
    state = scene.controller.states["a"]
    assert isinstance(state, Failed)
    assert "without a manifest" in state.error


def test_what_a_dying_node_committed_is_not_done_again() -> None:
    scene = Scene(make("a"))
    scene.step()
    commit(scene.store, scene.tasks["a"])
    scene.step(a=Broke("node died", HERE, node_fault=True))
    assert scene.controller.outcome() == "finished"
    assert scene.script.names == ["a"]


def test_a_store_that_is_away_for_a_moment_loses_nothing() -> None:
    scene = Scene(make("a"))
    scene.step()
    exists = scene.store.exists

    def away(key: str) -> bool:
        raise StoreUnavailable("gone")

    scene.store.exists = away  # type: ignore[method-assign]
    scene.step(a=Done(HERE, None))
    assert scene.controller.outcome() == "running"
    scene.store.exists = exists  # type: ignore[method-assign]
    scene.finish("a")
    assert scene.controller.outcome() == "finished"


def test_a_stop_drains_what_runs_and_places_nothing() -> None:
    scene = Scene(make("runs"), make("queued"), make("child", "runs"))
    scene.step()
    scene.step(runs=Alive(HERE, Progress(3, 10)))
    scene.controller.stop()
    scene.step()
    assert scene.kinds() == {"runs": Draining, "queued": Waiting, "child": Waiting}
    assert scene.script.drained == ["runs"]
    assert scene.controller.outcome() == "running"
    scene.step(runs=Stopped(HERE, Progress(4, 10, checkpoint_step=4)))
    assert scene.controller.outcome() == "interrupted"
    assert scene.script.sightings == {}
    assert len(scene.script.placed) == 2


def test_a_task_that_does_not_hear_is_killed() -> None:
    scene = Scene(make("deaf"))
    scene.step()
    scene.step(deaf=Alive(HERE, None))
    scene.controller.stop()
    scene.step()
    scene.now += DRAIN_PATIENCE + 1
    scene.step()
    assert scene.controller.outcome() == "interrupted"
    assert scene.script.sightings == {}


def test_stopping_unasked_is_a_failure() -> None:
    scene = Scene(make("a", attempts=1))
    scene.step()
    scene.step(a=Stopped(HERE, None))
    assert scene.kinds() == {"a": Failed}


def test_eta_leaves_out_the_start_and_the_steps_of_earlier_attempts() -> None:
    scene = Scene(make("a", steps=100))
    scene.step()
    scene.step(a=Alive(HERE, None))
    scene.now = 50.0
    scene.step(a=Alive(HERE, Progress(40, 100)))
    assert scene.controller.eta("a") is None
    scene.now = 60.0
    scene.step(a=Alive(HERE, Progress(60, 100)))
    assert scene.controller.eta("a") == pytest.approx(20.0)


def test_changes_are_told() -> None:
    told: list[tuple[str, type]] = []
    script = Script()
    task = make("a")
    controller = Controller(
        [task], MemoryStore(), script, on_change=lambda task, state: told.append((task.id, type(state)))
    )
    assert controller.step()
    assert not controller.step()
    script.sightings["a"] = Alive(HERE, Progress(1, 10))
    assert controller.step()
    script.sightings["a"] = Alive(HERE, Progress(2, 10))
    assert not controller.step(), "progress alone is no change of state"
    assert told == [("a", Placing), ("a", Running)]


# On nodes of which the launcher tells


def node(name: str, free: float = 1.0, cpus: float = 1.0) -> NodeFacts:
    return NodeFacts(name, name, "", {"CPU": cpus}, {"kind": name}, {"CPU": free})


def trained(name: str, steps: int = 100) -> Task:
    return replace(make(name, steps=steps), model="dense", step_tokens=10)


class Nodes(Scene):
    """A scene on two nodes, of which `fast` makes ten steps a second and `slow` one."""

    def __init__(self, *tasks: Task) -> None:
        super().__init__(*tasks)
        self.script.there = [node("fast"), node("slow")]

    def busy(self, *names: str) -> None:
        self.script.there = [node(name, free=0.0 if name in names else 1.0) for name in ("fast", "slow")]

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
    scene = Nodes(trained("a"), trained("b", 90), trained("c", 80))
    scene.step()
    assert scene.script.meant_for == {"a": None, "b": None}
    assert scene.script.expected == [["a", "b", "c"]], "a cluster that grows hears of all three"


def test_the_longest_waits_for_the_fastest_node_once_speeds_are_known() -> None:
    scene = Nodes(trained("a"), trained("b"), trained("c", 80), trained("d", 50))
    scene.measure()
    assert scene.controller.eta("a") == pytest.approx(6.9)
    assert scene.controller.eta("b") == pytest.approx(96)
    scene.busy()
    commit(scene.store, scene.tasks["a"])
    commit(scene.store, scene.tasks["b"])
    scene.step(a=Done(HERE, Progress(100, 100)), b=Done(HERE, Progress(100, 100)))
    assert scene.script.meant_for == {"a": None, "b": None, "c": "fast", "d": "slow"}


def test_a_task_moves_to_a_faster_node_that_falls_free_and_goes_on_there() -> None:
    scene = Nodes(trained("a"), trained("b"))
    scene.measure()
    slow = Node("slow", "slow")
    scene.now = 12.0
    scene.busy("slow")
    scene.controller.speeds.saw_checkpoint(("dense", "1 CPU"), 1.0)
    commit(scene.store, scene.tasks["a"])
    scene.step(a=Done(Node("fast", "fast"), Progress(100, 100)), b=Alive(slow, Progress(12, 100)))
    assert scene.kinds() == {"a": Committed, "b": Draining}
    assert scene.script.drained == ["b"]
    scene.now = 13.0
    scene.busy()
    scene.step(b=Stopped(slow, Progress(13, 100, checkpoint_step=13)))
    assert scene.script.meant_for["b"] == "fast"
    assert scene.controller.history("b").ended[0].cause == "moved"
    scene.busy("fast")
    scene.step(b=Alive(Node("fast", "fast"), None))
    state = scene.controller.states["b"]
    assert isinstance(state, Running)
    assert state.progress.step == 13, "shown where it stands while it reads its checkpoint"
    assert scene.controller.eta("b") == pytest.approx(8.7), "at the speed that was measured there"
    assert scene.controller.history("b").failures == 0


def test_a_task_that_does_not_hear_that_it_should_move_is_killed_at_last() -> None:
    scene = Nodes(trained("a"), trained("b"))
    scene.measure()
    scene.now = 12.0
    scene.busy("slow")
    commit(scene.store, scene.tasks["a"])
    deaf = Alive(Node("slow", "slow"), Progress(12, 100))
    scene.controller.speeds.saw_checkpoint(("dense", "1 CPU"), 1.0)
    scene.step(a=Done(Node("fast", "fast"), Progress(100, 100)), b=deaf)
    scene.now += DRAIN_PATIENCE + 1
    scene.step(b=deaf)
    assert scene.kinds()["b"] is Draining, "a large checkpoint may take longer than a run that stops would wait"
    scene.now += MOVE_PATIENCE
    scene.step(b=deaf)
    assert scene.script.meant_for["b"] == "fast"


def test_what_was_meant_for_a_node_that_is_gone_or_deaf_is_placed_again() -> None:
    scene = Nodes(trained("a"), trained("b"), trained("c", 80))
    scene.measure()
    scene.busy("slow")
    scene.finish("a")
    assert scene.script.meant_for["c"] == "fast"
    scene.script.there = [node("fast-again"), node("slow", free=0.0)]
    scene.step()
    assert scene.script.meant_for["c"] == "fast-again"
    scene.now += policies.PIN_PATIENCE + 1
    scene.step()
    assert scene.script.names.count("c") == 3, "it was not taken for too long: placed again"


def test_a_node_that_will_be_taken_away_is_left_in_time_and_given_nothing() -> None:
    scene = Nodes(trained("a"), trained("b"), replace(trained("c", 80), needs=Needs(labels={"kind": "fast"})))
    scene.measure()
    assert scene.script.there is not None
    fast, slow = scene.script.there
    scene.script.there = [replace(fast, leaving=True), slow]
    scene.step()
    assert scene.script.drained == ["a"]
    scene.script.there = [replace(fast, leaving=True, free={"CPU": 1.0}), slow]
    scene.step(a=Stopped(Node("fast", "fast"), Progress(40, 100, checkpoint_step=40)))
    assert scene.kinds() == {"a": Waiting, "b": Running, "c": Waiting}, "c may yet be met, but not there"
    assert (scene.controller.history("a").ended[0].cause, scene.controller.history("a").failures) == ("moved", 0)
    scene.script.there = [node("new"), slow]
    scene.step()
    assert scene.script.meant_for["a"] == "new"
    assert scene.script.drained == ["a"]


def test_work_without_checkpoints_stays_where_a_node_is_leaving() -> None:
    scene = Nodes(make("a", steps=0))
    scene.step()
    scene.step(a=Alive(Node("fast", "fast"), None))
    scene.script.there = [replace(node("fast"), leaving=True), node("slow")]
    scene.step()
    assert scene.script.drained == []
    scene.finish("a")
    assert scene.controller.outcome() == "finished"


def test_a_fallback_is_taken_and_said() -> None:
    needs = Needs(gpus=1, fallback=(Demand(cpus=1),))
    scene = Nodes(replace(trained("a"), needs=needs))
    scene.step()
    assert scene.script.names == ["a"]
    assert scene.controller.history("a").said == "no node can give 1 CPU, 1 GPU: took fallback 1, 1 CPU"


# Demands that no living node meets


def test_what_is_queued_waits_while_the_only_node_for_it_is_away() -> None:
    needs = Needs(labels={"kind": "fast"})
    first, queued, child = trained("first"), trained("queued", 80), make("child", "first")
    scene = Nodes(*(replace(task, needs=needs) for task in (first, queued, child)))
    scene.step()
    scene.busy("fast")
    scene.step(first=Alive(Node("fast", "fast"), None))
    scene.script.there = [node("slow")]
    scene.finish("first")
    assert scene.kinds() == {"first": Committed, "queued": Retrying, "child": Retrying}
    scene.script.there = [node("fast"), node("slow")]
    scene.step()
    assert scene.script.names == ["first"], "not looked for at every step"
    scene.now += policies.PLACEMENT_DELAY
    scene.step()
    assert sorted(scene.script.names) == ["child", "first", "queued"]


LONE_HEAD = NodeFacts("head", "head", "", {"CPU": 8.0, HEAD: 1.0}, {}, {"CPU": 8.0})


def test_a_head_that_was_just_begun_waits_for_its_workers() -> None:
    scene = Nodes(make("corpus"), replace(trained("a"), needs=Needs(labels={"kind": "slow"})))
    scene.script.there = [LONE_HEAD]
    scene.step()
    assert scene.kinds() == {"corpus": Placing, "a": Retrying}, "the head can do something"
    assert scene.script.expected == [["a", "corpus"]], "a cluster that grows on demand hears of it"
    scene.script.there = [LONE_HEAD, node("slow")]
    scene.now += policies.PLACEMENT_DELAY
    scene.step()
    assert scene.script.names == ["corpus", "a"]


def test_a_head_that_stays_alone_is_all_there_is() -> None:
    scene = Nodes(replace(trained("a"), needs=Needs(gpus=1)))
    scene.script.there = [LONE_HEAD]
    scene.step()
    scene.now += JOIN_PATIENCE
    with pytest.raises(PlacementError, match="branches/a needs 1 CPU, 1 GPU, which the 1 living nodes can never give"):
        scene.step()


def test_a_demand_that_can_never_be_met_is_refused_before_anything_begins() -> None:
    story = [make("seed"), make("branch", "seed"), replace(make("mix", "branch"), needs=Needs(gpus=1))]
    scene = Nodes(*story)
    with pytest.raises(
        PlacementError, match="branches/mix needs 1 CPU, 1 GPU, which the 2 living nodes can never give"
    ):
        scene.step()
    assert scene.script.placed == []
    commit(scene.store, scene.tasks["mix"])
    done = Controller(story, scene.store, scene.script)
    done.step()
    assert scene.script.names == ["seed"], "what is committed needs nothing"


def test_a_demand_is_checked_against_the_first_workers_where_a_head_came_alone() -> None:
    scene = Nodes(replace(trained("a"), needs=Needs(gpus=1)))
    scene.script.there = [LONE_HEAD]
    scene.step()
    scene.script.there.append(node("slow"))
    with pytest.raises(PlacementError, match="branches/a needs 1 CPU, 1 GPU"):
        scene.step()


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
        commit(store, task)

    controller = in_threads([make("a"), make("b", "a"), make("c", "a"), make("d", "b", "c")], store, work)
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
        commit(store, task)

    assert in_threads([make(f"t{i}") for i in range(6)], store, work, slots=2).run(pause=0.001) == "finished"
    assert most == 2


def test_errors_of_threads_carry_their_type_and_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "FIRST_DELAY", 0.001)
    begun: list[str] = []

    def work(task: Task, context: StageContext) -> None:
        begun.append(task.name)
        if task.name == "own":
            raise DataError("corpus is empty")
        raise ZeroDivisionError("by zero")

    controller = in_threads([make("own"), make("bug", attempts=2)], MemoryStore(), work)
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
        commit(store, task)

    controller = in_threads([make("a", attempts=1)], store, work)
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
        commit(store, task)

    tasks = [make("a", steps=200), make("b", "a", steps=200)]
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
