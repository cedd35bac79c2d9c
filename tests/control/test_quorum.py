"""Mixing starts with the branches that have arrived; those that come later are absorbed."""

import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.control import status
from bam_ray.control.controller import Controller
from bam_ray.control.observations import Alive, Broke, Stopped
from bam_ray.errors import StoreUnavailable
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.pipeline.states import Blocked, Committed, Draining, Failed, Placing, Running, Waiting
from bam_ray.pipeline.tasks import Progress, Quorum, Task
from bam_ray.planning.plan_table import render_plan
from bam_ray.planning.planner import make_plan
from tests.support.control.sample_recipe import changed_tasks, sample_recipe
from tests.support.control.scripted_launcher import NODE, ControllerHarness, commit_task, make_task
from tests.support.control.simulated_run import make_cluster, simulate_tasks

TWO = "upcycle.when={at_least: 2}"
HOUR = 3600.0


def story(at_least: int = 2, deadline: float = 0.0, names: str = "abc") -> list[Task]:
    """A seed, its branches, a mixture that does with `at_least` of them, and the report."""
    seed = replace(make_task("seed"), kind="seeds")
    branches = [make_task(name, "seed") for name in names]
    quorum = Quorum(tuple((name, name) for name in names), at_least, deadline)
    upcycled = replace(make_task("up", "seed", *names, steps=0), kind="upcycled", quorum=quorum)
    later = replace(quorum, at_least=0, deadline=0.0)
    mixture = replace(make_task("mix", "up", steps=100), kind="mixtures", quorum=later)
    whole = replace(quorum, at_least=0, deadline=math.inf)
    report = replace(make_task("report", *names, "mix", steps=0), kind="reports", quorum=whole)
    return [seed, *branches, upcycled, mixture, report]


class Mixing(ControllerHarness):
    """A controller whose seed is committed, at a time of day that a test turns too."""

    def __init__(self, *tasks: Task) -> None:
        super().__init__(*tasks, committed=("seed",))
        self.wall = datetime(2030, 1, 1, tzinfo=UTC).timestamp()
        self.begin()

    def begin(self) -> None:
        """A controller that knows what the store knows."""
        self.launcher.statuses.clear()
        self.controller = Controller(
            list(self.tasks.values()), self.store, self.launcher, clock=lambda: self.now, wall=lambda: self.wall
        )

    def mixes(self, step: int, *experts: str) -> None:
        self.step(mix=Alive(NODE, Progress(step, 100, experts=("seed", *experts))))

    def note(self, task_id: str) -> str:
        return next(row.note for row in status.build("run", self.controller).rows if row.id == task_id)


def test_a_mixture_starts_with_the_branches_that_have_arrived() -> None:
    harness = Mixing(*story())
    harness.step()
    harness.finish("a")
    assert harness.kinds()["up"] is Waiting
    assert harness.note("up") == "1 of 3 branches have arrived, 2 are enough"
    harness.finish("c")
    assert harness.kinds()["up"] is Placing
    harness.finish("up")
    assert harness.kinds()["mix"] is Placing
    assert harness.kinds()["b"] is Placing, "the late branch goes on"


def test_a_late_branch_is_absorbed_at_a_checkpoint_and_costs_no_attempt() -> None:
    harness = Mixing(*story())
    harness.step()
    for name in ("a", "c", "up"):
        harness.finish(name)
    harness.mixes(5, "a", "c")
    assert harness.kinds()["mix"] is Running
    harness.finish("b")
    assert harness.kinds()["mix"] is Draining
    harness.now += 1.0
    harness.step(mix=Stopped(NODE, Progress(6, 100, checkpoint_step=6, experts=("seed", "a", "c"))))
    assert harness.kinds()["mix"] is Placing, "placed again at once"
    history = harness.controller.history("mix")
    assert (history.ended[-1].cause, history.failures) == ("to absorb b", 0)
    harness.step(mix=Alive(NODE, None))
    harness.step()
    assert harness.kinds()["mix"] is Running, "what it was made of before says nothing of this attempt"
    harness.mixes(7, "a", "c", "b")
    harness.step()
    assert harness.kinds()["mix"] is Running
    assert harness.launcher.drained == ["mix"]


def test_a_branch_that_arrives_while_an_attempt_begins_is_not_missed() -> None:
    harness = Mixing(*story())
    harness.step()
    for name in ("a", "c", "up"):
        harness.finish(name)
    harness.step(mix=Alive(NODE, Progress(0, 100, note="gathering 2 processes")))
    harness.finish("b")
    assert harness.kinds()["mix"] is Running, "it may yet see the branch for itself"
    harness.mixes(1, "a", "c")
    assert harness.kinds()["mix"] is Draining, "it had looked before"


def test_a_branch_that_arrives_after_the_mixture_stays_out() -> None:
    harness = Mixing(*story())
    harness.step()
    for name in ("a", "c", "up"):
        harness.finish(name)
    harness.mixes(5, "a", "c")
    commit_task(harness.store, harness.tasks["mix"])
    harness.step(mix=Broke("the node died", NODE, Progress(100, 100, experts=("seed", "a", "c"))))
    harness.finish("b")
    assert harness.kinds()["mix"] is Committed
    assert harness.note("mix") == "made without b: `bam absorb` adds what arrives now"
    assert harness.kinds()["report"] is Placing
    harness.finish("report")
    assert harness.controller.outcome() == "finished"


def test_a_branch_that_failed_stops_nothing_while_enough_can_come() -> None:
    harness = Mixing(*story())
    harness.step()
    harness.step(b=Broke("bad text", NODE, final=True))
    assert harness.kinds()["up"] is Waiting
    for name in ("a", "c", "up", "mix"):
        harness.finish(name)
    assert harness.kinds()["report"] is Placing, "it is of what there is"
    harness.finish("report")
    assert harness.controller.outcome() == "finished"
    assert harness.kinds()["b"] is Failed


def test_too_many_failed_branches_stop_the_mixture() -> None:
    harness = Mixing(*story())
    harness.step()
    harness.step(b=Broke("bad text", NODE, final=True))
    harness.step(c=Broke("bad text too", NODE, final=True))
    blocked = harness.controller.states["up"]
    assert isinstance(blocked, Blocked)
    assert blocked.by == "branches/b"
    harness.finish("a")
    assert harness.controller.outcome() == "failed"


def test_a_report_waits_for_branches_that_can_still_come() -> None:
    harness = Mixing(*story())
    harness.step()
    for name in ("a", "c", "up", "mix"):
        harness.finish(name)
    assert harness.kinds()["report"] is Waiting
    harness.step(b=Broke("bad text", NODE, final=True))
    assert harness.kinds()["report"] is Placing


def test_a_deadline_waits_for_the_others_and_outlives_the_controller() -> None:
    harness = Mixing(*story(at_least=1, deadline=2 * HOUR))
    harness.step()
    harness.finish("a")
    harness.wall += 1.5 * HOUR
    harness.begin()
    harness.step()
    assert harness.kinds()["up"] is Waiting
    harness.wall += HOUR
    harness.step()
    assert harness.kinds()["up"] is Placing, "counted from when the first controller saw the seed"


def test_a_deadline_is_not_waited_for_when_no_branch_is_to_come() -> None:
    harness = Mixing(*story(at_least=1, deadline=2 * HOUR))
    harness.step()
    harness.finish("a")
    harness.finish("b")
    assert harness.kinds()["up"] is Waiting
    harness.step(c=Broke("bad text", NODE, final=True))
    assert harness.kinds()["up"] is Placing


def test_a_store_that_is_away_at_first_does_not_stop_the_clock_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Mixing(*story(at_least=1, deadline=HOUR))

    def away(self: MemoryStore, key: str, data: bytes) -> None:
        raise StoreUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "put_if_absent", away)
        harness.step()
    harness.finish("a")
    harness.wall += HOUR
    harness.step()
    assert harness.kinds()["up"] is Placing


# The recipe's tasks


def ids(*overrides: str) -> dict[str, str]:
    return {task.where: task.id for task in task_graph(sample_recipe(*overrides))}


def test_a_quorum_makes_other_mixtures_and_nothing_else_anew() -> None:
    assert changed_tasks(TWO) == {"upcycled/bam", "upcycled/btx", "mixtures/bam", "mixtures/btx", "reports/report"}
    assert ids() == ids("upcycle.when=all")
    assert ids()["upcycled/bam"] == "bam-63327f04bf79", "as it was before there were quorums"


def test_what_is_made_of_the_seed_alone_waits_for_no_branch() -> None:
    sparse = "upcycle.mixtures={bam: {method: bam}, sparse: {method: sparse, num_experts: 4}}"
    before, after = ids(sparse), ids(sparse, TWO)
    assert {where for where in before if before[where] != after[where]} == {
        "upcycled/bam",
        "mixtures/bam",
        "reports/report",
    }
    tasks = task_graph(sample_recipe(sparse, TWO))
    assert find_task(tasks, "upcycled", "sparse").quorum is None
    assert find_task(tasks, "mixtures", "sparse").quorum is None


def test_tasks_say_which_branches_may_be_late() -> None:
    tasks = task_graph(sample_recipe("upcycle.when={at_least: 2, deadline_hours: 1.5}"))
    branches = tuple((task.id, task.name) for task in tasks if task.kind == "branches")
    assert find_task(tasks, "upcycled", "bam").quorum == Quorum(branches, 2, 1.5 * HOUR)
    assert find_task(tasks, "mixtures", "bam").quorum == Quorum(branches, 0, 0.0)
    assert find_task(tasks, "reports", "report").quorum == Quorum(branches, 0, math.inf)
    assert all(task.quorum is None for task in task_graph(sample_recipe()))


# Without nodes


def test_a_plan_says_with_how_many_branches_mixing_starts() -> None:
    from rich.console import Console

    console = Console(width=200, record=True)
    console.print(render_plan(make_plan(sample_recipe("upcycle.when={at_least: 2, deadline_hours: 6}")), 160))
    assert (
        "mixing starts with at least 2 of 3 branches, 6 hours after they can begin, and absorbs"
        in console.export_text()
    )


def test_a_simulated_mixture_starts_early_and_absorbs() -> None:
    tasks = [replace(task, model=task.kind, step_tokens=1000) if task.total_steps else task for task in story()]
    tasks[3] = replace(tasks[3], total_steps=250)  # the third branch takes longer
    made = simulate_tasks(tasks, make_cluster({"one": (4, 1000.0)}))
    assert made.outcome == "finished"
    assert [ended.cause for ended in made.attempts["mix"]] == ["to absorb c", "committed"]
