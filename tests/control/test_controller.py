"""The decisions of the controller over a scripted launcher."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.leases import AttemptNumber
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control import policies
from bam_ray.control.controller import Controller
from bam_ray.control.observations import Alive, Crashed, Done, Stopped
from bam_ray.control.transitions import Free, Launch, changed_tasks
from bam_ray.errors import StoreUnavailable
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
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.placement import MAX_PENDING
from tests.support.control.scripted_launcher import (
    NODE,
    ControllerHarness,
    ScriptedLauncher,
    commit_task,
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
    launcher = ScriptedLauncher()
    controller = Controller([make_task("a")], MemoryStore(), launcher)
    placed = controller.step()
    assert [(each.task_id, each.previous.label, each.state.label) for each in placed] == [("a", "waiting", "placing")]
    assert not controller.step()
    launcher.statuses["a"] = Alive(NODE, Progress(1, 10))
    running = controller.step()
    assert [(each.previous.label, each.state.label) for each in running] == [("placing", "running")]
    launcher.statuses["a"] = Alive(NODE, Progress(2, 10))
    assert not controller.step(), "progress alone is no transition"


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
    assert (launch.placed.number, launch.avoid) == (AttemptNumber(1, 2), frozenset({"1"}))
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
