"""A mixture starts with the committed branches and absorbs the branches that are committed later."""

import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control import status
from bam_ray.control.controller import Controller
from bam_ray.control.observations import Alive, Crashed, Done, Stopped
from bam_ray.errors import StoreUnavailable
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.pipeline.states import Blocked, Committed, Draining, Failed, Placing, Retrying, Running, Waiting
from bam_ray.pipeline.tasks import BranchQuorum, DamagedArtifact, Progress, Task
from bam_ray.planning.plan_table import render_plan
from bam_ray.planning.planner import make_plan
from tests.support.control.sample_recipe import changed_tasks, sample_recipe
from tests.support.control.scripted_launcher import NODE, ControllerHarness, commit_task, make_task
from tests.support.planning.simulated_run import make_cluster, simulate_tasks

TWO = "upcycle.when={at_least: 2}"
HOUR = 3600.0


def make_run(at_least: int = 2, deadline: float = 0.0, names: str = "abc") -> list[Task]:
    """Return a seed, its branches, a mixture that requires `at_least` of them, and the report."""
    seed = replace(make_task("seed"), kind="seeds")
    branches = [make_task(name, "seed") for name in names]
    quorum = BranchQuorum(tuple((name, name) for name in names), at_least, deadline)
    upcycled = replace(make_task("up", "seed", *names, steps=0), kind="upcycled", quorum=quorum)
    later = replace(quorum, at_least=0, deadline=0.0)
    mixture = replace(make_task("mix", "up", steps=100), kind="mixtures", quorum=later)
    whole = replace(quorum, at_least=0, deadline=math.inf)
    report = replace(make_task("report", *names, "mix", steps=0), kind="reports", quorum=whole)
    return [seed, *branches, upcycled, mixture, report]


class MixingHarness(ControllerHarness):
    """A controller whose seed is committed, with a wall clock that a test advances by setting `wall`."""

    def __init__(self, *tasks: Task) -> None:
        super().__init__(*tasks, committed=("seed",))
        self.wall = datetime(2030, 1, 1, tzinfo=UTC).timestamp()
        self.restart()

    def restart(self) -> None:
        """Replace the controller by a new one over the same store."""
        self.launcher.statuses.clear()
        self.controller = Controller(
            list(self.tasks.values()), self.store, self.launcher, clock=lambda: self.now, wall=lambda: self.wall
        )

    def report_step(self, step: int, *experts: str) -> None:
        """Let the mixture report a step with the seed and `experts` as its experts."""
        self.step(mix=Alive(NODE, Progress(step, 100, experts=("seed", *experts))))

    def note(self, task_id: str) -> str:
        """Return the note of a task in the status."""
        return next(row.note for row in status.build("run", self.controller).rows if row.id == task_id)


def test_a_mixture_starts_when_its_quorum_is_met() -> None:
    harness = MixingHarness(*make_run())
    harness.step()
    harness.finish("a")
    assert harness.kinds()["up"] is Waiting
    assert harness.note("up") == "1 of 3 branches are committed, 2 are required"
    harness.finish("c")
    assert harness.kinds()["up"] is Placing
    harness.finish("up")
    assert harness.kinds()["mix"] is Placing
    assert harness.kinds()["b"] is Placing, "the late branch is still being trained"


def test_absorbing_a_late_branch_is_not_a_failure() -> None:
    harness = MixingHarness(*make_run())
    harness.step()
    for name in ("a", "c", "up"):
        harness.finish(name)
    harness.report_step(5, "a", "c")
    assert harness.kinds()["mix"] is Running
    harness.finish("b")
    assert harness.kinds()["mix"] is Draining
    harness.now += 1.0
    harness.step(mix=Stopped(NODE, Progress(6, 100, checkpoint_step=6, experts=("seed", "a", "c"))))
    assert harness.kinds()["mix"] is Placing, "placed again at once"
    history = harness.controller.history("mix")
    assert (history.past_attempts[-1].cause, history.failures) == ("to absorb b", 0)
    harness.step(mix=Alive(NODE, None))
    harness.step()
    assert harness.kinds()["mix"] is Running, "the experts of the last attempt do not count for this one"
    harness.report_step(7, "a", "c", "b")
    harness.step()
    assert harness.kinds()["mix"] is Running
    assert harness.launcher.drained == ["mix"]


def test_a_branch_committed_during_a_start_is_absorbed() -> None:
    harness = MixingHarness(*make_run())
    harness.step()
    for name in ("a", "c", "up"):
        harness.finish(name)
    harness.step(mix=Alive(NODE, Progress(0, 100, note="gathering 2 processes")))
    harness.finish("b")
    assert harness.kinds()["mix"] is Running, "the attempt may still find the branch by itself"
    harness.report_step(1, "a", "c")
    assert harness.kinds()["mix"] is Draining, "the attempt started without the branch"


def test_a_branch_committed_after_the_mixture_is_left_out() -> None:
    harness = MixingHarness(*make_run())
    harness.step()
    for name in ("a", "c", "up"):
        harness.finish(name)
    harness.report_step(5, "a", "c")
    commit_task(harness.store, harness.tasks["mix"])
    harness.step(mix=Crashed("the node died", NODE, Progress(100, 100, experts=("seed", "a", "c"))))
    harness.finish("b")
    assert harness.kinds()["mix"] is Committed
    assert harness.note("mix") == "made without b: add late branches with `bam absorb`"
    assert harness.kinds()["report"] is Placing
    harness.finish("report")
    assert harness.controller.outcome() == "finished"


def test_a_mixture_does_not_start_before_a_damaged_branch() -> None:
    harness = MixingHarness(*make_run())
    harness.step()
    for name in ("a", "c", "b"):
        harness.finish(name)
    harness.step(up=Crashed("a file is damaged", NODE, None, damaged="a"))
    for _ in range(5):
        harness.now += HOUR
        harness.step()
        assert harness.kinds()["a"] is Placing
        assert harness.kinds()["up"] is Retrying, "although two branches are committed"
    harness.finish("a")
    assert harness.kinds()["up"] is Placing
    assert harness.controller.history("up").failures == 1


class DamagedBranchHarness(MixingHarness):
    """A controller whose mixture trains with the branches a and c, and has found the late branch b damaged."""

    def __init__(self) -> None:
        super().__init__(*make_run())
        self.branch = Artifact(self.store, ArtifactKind.BRANCHES, "b")
        self.step()
        for name in ("a", "c", "up", "b"):
            self.finish(name)
        self.report_damage()

    def report_damage(self, step: int = 5, generation: int = 0) -> None:
        """Let the mixture report that it trains without the branch, of which a generation is damaged."""
        damaged = (DamagedArtifact("b", generation),)
        self.step(mix=Alive(NODE, Progress(step, 100, experts=("seed", "a", "c"), left_out=("b",), damaged=damaged)))

    def make_again(self) -> None:
        """Set the branch aside, commit it again, and let its attempt end."""
        manifest = self.branch.manifest()
        assert manifest is not None
        self.branch.set_aside(manifest, "a file is damaged")
        self.finish("b")


def test_a_damaged_late_branch_is_made_again_and_absorbed() -> None:
    harness = DamagedBranchHarness()
    assert harness.kinds()["b"] is Placing, "an attempt checks its files"
    assert harness.controller.history("b").suspect
    assert harness.note("b").startswith("mixtures/mix found its files damaged; they are checked, and made again")
    harness.step(b=Alive(NODE, Progress(1, 10)))
    harness.report_damage(step=6)
    assert harness.kinds()["mix"] is Running, "it trains while the branch is made again"
    assert harness.kinds()["report"] is Waiting
    harness.make_again()
    assert harness.kinds()["mix"] is Draining
    harness.step(mix=Stopped(NODE, Progress(7, 100, checkpoint_step=7, experts=("seed", "a", "c"), left_out=("b",))))
    harness.report_step(8, "a", "c", "b")
    history = harness.controller.history("mix")
    assert [past.cause for past in history.past_attempts] == ["to absorb b"]
    assert (harness.kinds()["mix"], history.failures) == (Running, 0)
    assert harness.launcher.drained == ["mix"]
    assert harness.launcher.names.count("b") == 2


def test_a_late_branch_that_is_intact_is_checked_once() -> None:
    """A mixture must not be stopped again and again if only its own node reads damaged files."""
    harness = DamagedBranchHarness()
    harness.step(b=Done(NODE, None))
    for step in range(6, 9):
        harness.report_damage(step)
        assert (harness.kinds()["b"], harness.kinds()["mix"]) == (Committed, Running)
    assert harness.launcher.drained == []
    harness.restart()
    harness.step()
    harness.report_damage()
    assert harness.kinds()["b"] is Placing, "another driver lets it be checked once more"


def test_a_branch_that_is_damaged_twice_is_made_again_twice() -> None:
    harness = DamagedBranchHarness()
    harness.make_again()
    harness.step(mix=Stopped(NODE, Progress(7, 100, checkpoint_step=7, experts=("seed", "a", "c"), left_out=("b",))))
    harness.report_damage(step=8, generation=1)
    assert harness.kinds()["b"] is Placing
    harness.make_again()
    assert harness.kinds()["mix"] is Draining
    assert harness.launcher.drained == ["mix", "mix"]


def test_a_branch_that_is_made_again_too_late_is_left_out() -> None:
    harness = DamagedBranchHarness()
    harness.finish("mix")
    assert harness.controller.outcome() == "running"
    harness.make_again()
    assert harness.kinds()["mix"] is Committed
    harness.finish("report")
    assert harness.controller.outcome() == "finished"


def test_damage_is_reported_by_the_end_of_a_mixture_too() -> None:
    harness = MixingHarness(*make_run())
    harness.step()
    for name in ("a", "c", "up", "b"):
        harness.finish(name)
    commit_task(harness.store, harness.tasks["mix"])
    progress = Progress(100, 100, experts=("seed", "a", "c"), left_out=("b",), damaged=(DamagedArtifact("b", 0),))
    harness.step(mix=Done(NODE, progress))
    assert (harness.kinds()["mix"], harness.kinds()["b"]) == (Committed, Placing)
    assert harness.note("mix") == "made without b: add late branches with `bam absorb`"


def test_a_failed_branch_blocks_nothing_while_the_quorum_is_reachable() -> None:
    harness = MixingHarness(*make_run())
    harness.step()
    harness.step(b=Crashed("bad text", NODE, final=True))
    assert harness.kinds()["up"] is Waiting
    for name in ("a", "c", "up", "mix"):
        harness.finish(name)
    assert harness.kinds()["report"] is Placing, "the report covers the branches that exist"
    harness.finish("report")
    assert harness.controller.outcome() == "finished"
    assert harness.kinds()["b"] is Failed


def test_too_many_failed_branches_block_the_mixture() -> None:
    harness = MixingHarness(*make_run())
    harness.step()
    harness.step(b=Crashed("bad text", NODE, final=True))
    harness.step(c=Crashed("bad text too", NODE, final=True))
    blocked = harness.controller.states["up"]
    assert isinstance(blocked, Blocked)
    assert blocked.by == "branches/b"
    harness.finish("a")
    assert harness.controller.outcome() == "failed"


def test_a_report_waits_for_branches_that_are_still_running() -> None:
    harness = MixingHarness(*make_run())
    harness.step()
    for name in ("a", "c", "up", "mix"):
        harness.finish(name)
    assert harness.kinds()["report"] is Waiting
    harness.step(b=Crashed("bad text", NODE, final=True))
    assert harness.kinds()["report"] is Placing


def test_a_deadline_outlives_the_controller() -> None:
    harness = MixingHarness(*make_run(at_least=1, deadline=2 * HOUR))
    harness.step()
    harness.finish("a")
    harness.wall += 1.5 * HOUR
    harness.restart()
    harness.step()
    assert harness.kinds()["up"] is Waiting
    harness.wall += HOUR
    harness.step()
    assert harness.kinds()["up"] is Placing, "the deadline started under the first controller"


def test_a_deadline_ends_early_if_no_other_branch_can_come() -> None:
    harness = MixingHarness(*make_run(at_least=1, deadline=2 * HOUR))
    harness.step()
    harness.finish("a")
    harness.finish("b")
    assert harness.kinds()["up"] is Waiting
    harness.step(c=Crashed("bad text", NODE, final=True))
    assert harness.kinds()["up"] is Placing


def test_a_deadline_starts_after_an_outage_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = MixingHarness(*make_run(at_least=1, deadline=HOUR))

    def unavailable(self: MemoryStore, key: str, data: bytes) -> None:
        raise StoreUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "put_if_absent", unavailable)
        harness.step()
    harness.finish("a")
    harness.wall += HOUR
    harness.step()
    assert harness.kinds()["up"] is Placing


# The tasks of a recipe


def ids(*overrides: str) -> dict[str, str]:
    """Return the ids of all tasks by kind/name."""
    return {task.full_name: task.id for task in task_graph(sample_recipe(*overrides))}


def test_a_quorum_changes_the_ids_of_mixtures_only() -> None:
    assert changed_tasks(TWO) == {"upcycled/bam", "upcycled/btx", "mixtures/bam", "mixtures/btx", "reports/report"}
    assert ids() == ids("upcycle.when=all")
    assert ids()["upcycled/bam"] == "bam-1ecf8153daeb", "an id never changes by accident"


def test_a_mixture_of_the_seed_alone_has_no_quorum() -> None:
    sparse = "upcycle.mixtures={bam: {method: bam}, sparse: {method: sparse, num_experts: 4}}"
    before, after = ids(sparse), ids(sparse, TWO)
    assert {name for name in before if before[name] != after[name]} == {
        "upcycled/bam",
        "mixtures/bam",
        "reports/report",
    }
    tasks = task_graph(sample_recipe(sparse, TWO))
    assert find_task(tasks, ArtifactKind.UPCYCLED, "sparse").quorum is None
    assert find_task(tasks, ArtifactKind.MIXTURES, "sparse").quorum is None


def test_tasks_list_the_branches_that_may_be_late() -> None:
    tasks = task_graph(sample_recipe("upcycle.when={at_least: 2, deadline_hours: 1.5}"))
    branches = tuple((task.id, task.name) for task in tasks if task.kind == "branches")
    assert find_task(tasks, ArtifactKind.UPCYCLED, "bam").quorum == BranchQuorum(branches, 2, 1.5 * HOUR)
    assert find_task(tasks, ArtifactKind.MIXTURES, "bam").quorum == BranchQuorum(branches, 0, 0.0)
    assert find_task(tasks, ArtifactKind.REPORTS, "report").quorum == BranchQuorum(branches, 0, math.inf)
    assert all(task.quorum is None for task in task_graph(sample_recipe()))


# Plans and simulations


def test_a_plan_shows_the_quorum() -> None:
    from rich.console import Console

    console = Console(width=200, record=True)
    console.print(render_plan(make_plan(sample_recipe("upcycle.when={at_least: 2, deadline_hours: 6}")), 160))
    assert (
        "mixing starts with all 3 branches, or 6 hours after they can start with at least 2 of them, and absorbs"
        in console.export_text()
    )


def test_a_simulated_mixture_starts_early_and_absorbs() -> None:
    tasks = [replace(task, model=task.kind, step_tokens=1000) if task.total_steps else task for task in make_run()]
    tasks[3] = replace(tasks[3], total_steps=250)  # the third branch takes longer
    simulated = simulate_tasks(tasks, make_cluster({"one": (4, 1000.0)}))
    assert simulated.outcome == "finished"
    assert [past.cause for past in simulated.attempts["mix"]] == ["to absorb c", "committed"]
