"""Mixing starts with the branches that have arrived; those that come later are absorbed."""

import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from test_controller import HERE, Scene, commit, make
from test_graph import changed, recipe
from test_simulate import cluster, run

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

TWO = "upcycle.when={at_least: 2}"
HOUR = 3600.0


def story(at_least: int = 2, deadline: float = 0.0, names: str = "abc") -> list[Task]:
    """A seed, its branches, a mixture that does with `at_least` of them, and the report."""
    seed = replace(make("seed"), kind="seeds")
    branches = [make(name, "seed") for name in names]
    quorum = Quorum(tuple((name, name) for name in names), at_least, deadline)
    upcycled = replace(make("up", "seed", *names, steps=0), kind="upcycled", quorum=quorum)
    later = replace(quorum, at_least=0, deadline=0.0)
    mixture = replace(make("mix", "up", steps=100), kind="mixtures", quorum=later)
    whole = replace(quorum, at_least=0, deadline=math.inf)
    report = replace(make("report", *names, "mix", steps=0), kind="reports", quorum=whole)
    return [seed, *branches, upcycled, mixture, report]


class Mixing(Scene):
    """A scene whose seed is committed, at a time of day that a test turns too."""

    def __init__(self, *tasks: Task) -> None:
        super().__init__(*tasks, committed=("seed",))
        self.wall = datetime(2030, 1, 1, tzinfo=UTC).timestamp()
        self.begin()

    def begin(self) -> None:
        """A controller that knows what the store knows."""
        self.script.sightings.clear()
        self.controller = Controller(
            list(self.tasks.values()), self.store, self.script, clock=lambda: self.now, wall=lambda: self.wall
        )

    def mixes(self, step: int, *experts: str) -> None:
        self.step(mix=Alive(HERE, Progress(step, 100, experts=("seed", *experts))))

    def note(self, task_id: str) -> str:
        return next(row.note for row in status.build("run", self.controller).rows if row.id == task_id)


def test_a_mixture_starts_with_the_branches_that_have_arrived() -> None:
    scene = Mixing(*story())
    scene.step()
    scene.finish("a")
    assert scene.kinds()["up"] is Waiting
    assert scene.note("up") == "1 of 3 branches have arrived, 2 are enough"
    scene.finish("c")
    assert scene.kinds()["up"] is Placing
    scene.finish("up")
    assert scene.kinds()["mix"] is Placing
    assert scene.kinds()["b"] is Placing, "the late branch goes on"


def test_a_late_branch_is_absorbed_at_a_checkpoint_and_costs_no_attempt() -> None:
    scene = Mixing(*story())
    scene.step()
    for name in ("a", "c", "up"):
        scene.finish(name)
    scene.mixes(5, "a", "c")
    assert scene.kinds()["mix"] is Running
    scene.finish("b")
    assert scene.kinds()["mix"] is Draining
    scene.now += 1.0
    scene.step(mix=Stopped(HERE, Progress(6, 100, checkpoint_step=6, experts=("seed", "a", "c"))))
    assert scene.kinds()["mix"] is Placing, "placed again at once"
    history = scene.controller.history("mix")
    assert (history.ended[-1].cause, history.failures) == ("to absorb b", 0)
    scene.step(mix=Alive(HERE, None))
    scene.step()
    assert scene.kinds()["mix"] is Running, "what it was made of before says nothing of this attempt"
    scene.mixes(7, "a", "c", "b")
    scene.step()
    assert scene.kinds()["mix"] is Running
    assert scene.script.drained == ["mix"]


def test_a_branch_that_arrives_while_an_attempt_begins_is_not_missed() -> None:
    scene = Mixing(*story())
    scene.step()
    for name in ("a", "c", "up"):
        scene.finish(name)
    scene.step(mix=Alive(HERE, Progress(0, 100, note="gathering 2 processes")))
    scene.finish("b")
    assert scene.kinds()["mix"] is Running, "it may yet see the branch for itself"
    scene.mixes(1, "a", "c")
    assert scene.kinds()["mix"] is Draining, "it had looked before"


def test_a_branch_that_arrives_after_the_mixture_stays_out() -> None:
    scene = Mixing(*story())
    scene.step()
    for name in ("a", "c", "up"):
        scene.finish(name)
    scene.mixes(5, "a", "c")
    commit(scene.store, scene.tasks["mix"])
    scene.step(mix=Broke("the node died", HERE, Progress(100, 100, experts=("seed", "a", "c"))))
    scene.finish("b")
    assert scene.kinds()["mix"] is Committed
    assert scene.note("mix") == "made without b: `bam absorb` adds what arrives now"
    assert scene.kinds()["report"] is Placing
    scene.finish("report")
    assert scene.controller.outcome() == "finished"


def test_a_branch_that_failed_stops_nothing_while_enough_can_come() -> None:
    scene = Mixing(*story())
    scene.step()
    scene.step(b=Broke("bad text", HERE, final=True))
    assert scene.kinds()["up"] is Waiting
    for name in ("a", "c", "up", "mix"):
        scene.finish(name)
    assert scene.kinds()["report"] is Placing, "it is of what there is"
    scene.finish("report")
    assert scene.controller.outcome() == "finished"
    assert scene.kinds()["b"] is Failed


def test_too_many_failed_branches_stop_the_mixture() -> None:
    scene = Mixing(*story())
    scene.step()
    scene.step(b=Broke("bad text", HERE, final=True))
    scene.step(c=Broke("bad text too", HERE, final=True))
    blocked = scene.controller.states["up"]
    assert isinstance(blocked, Blocked)
    assert blocked.by == "branches/b"
    scene.finish("a")
    assert scene.controller.outcome() == "failed"


def test_a_report_waits_for_branches_that_can_still_come() -> None:
    scene = Mixing(*story())
    scene.step()
    for name in ("a", "c", "up", "mix"):
        scene.finish(name)
    assert scene.kinds()["report"] is Waiting
    scene.step(b=Broke("bad text", HERE, final=True))
    assert scene.kinds()["report"] is Placing


def test_a_deadline_waits_for_the_others_and_outlives_the_controller() -> None:
    scene = Mixing(*story(at_least=1, deadline=2 * HOUR))
    scene.step()
    scene.finish("a")
    scene.wall += 1.5 * HOUR
    scene.begin()
    scene.step()
    assert scene.kinds()["up"] is Waiting
    scene.wall += HOUR
    scene.step()
    assert scene.kinds()["up"] is Placing, "counted from when the first controller saw the seed"


def test_a_deadline_is_not_waited_for_when_no_branch_is_to_come() -> None:
    scene = Mixing(*story(at_least=1, deadline=2 * HOUR))
    scene.step()
    scene.finish("a")
    scene.finish("b")
    assert scene.kinds()["up"] is Waiting
    scene.step(c=Broke("bad text", HERE, final=True))
    assert scene.kinds()["up"] is Placing


def test_a_store_that_is_away_at_first_does_not_stop_the_clock_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Mixing(*story(at_least=1, deadline=HOUR))

    def away(self: MemoryStore, key: str, data: bytes) -> None:
        raise StoreUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "put_if_absent", away)
        scene.step()
    scene.finish("a")
    scene.wall += HOUR
    scene.step()
    assert scene.kinds()["up"] is Placing


# The recipe's tasks


def ids(*overrides: str) -> dict[str, str]:
    return {task.where: task.id for task in task_graph(recipe(*overrides))}


def test_a_quorum_makes_other_mixtures_and_nothing_else_anew() -> None:
    assert changed(TWO) == {"upcycled/bam", "upcycled/btx", "mixtures/bam", "mixtures/btx", "reports/report"}
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
    tasks = task_graph(recipe(sparse, TWO))
    assert find_task(tasks, "upcycled", "sparse").quorum is None
    assert find_task(tasks, "mixtures", "sparse").quorum is None


def test_tasks_say_which_branches_may_be_late() -> None:
    tasks = task_graph(recipe("upcycle.when={at_least: 2, deadline_hours: 1.5}"))
    branches = tuple((task.id, task.name) for task in tasks if task.kind == "branches")
    assert find_task(tasks, "upcycled", "bam").quorum == Quorum(branches, 2, 1.5 * HOUR)
    assert find_task(tasks, "mixtures", "bam").quorum == Quorum(branches, 0, 0.0)
    assert find_task(tasks, "reports", "report").quorum == Quorum(branches, 0, math.inf)
    assert all(task.quorum is None for task in task_graph(recipe()))


# Without nodes


def test_a_plan_says_with_how_many_branches_mixing_starts() -> None:
    from rich.console import Console

    console = Console(width=200, record=True)
    console.print(render_plan(make_plan(recipe("upcycle.when={at_least: 2, deadline_hours: 6}")), 160))
    assert (
        "mixing starts with at least 2 of 3 branches, 6 hours after they can begin, and absorbs"
        in console.export_text()
    )


def test_a_simulated_mixture_starts_early_and_absorbs() -> None:
    tasks = [replace(task, model=task.kind, step_tokens=1000) if task.total_steps else task for task in story()]
    tasks[3] = replace(tasks[3], total_steps=250)  # the third branch takes longer
    made = run(tasks, cluster({"one": (4, 1000.0)}))
    assert made.outcome == "finished"
    assert [ended.cause for ended in made.attempts["mix"]] == ["to absorb c", "committed"]
