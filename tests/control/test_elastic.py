"""Groups: placed whole or not at all, and with fewer workers where nodes are gone for good."""

from dataclasses import replace

import pytest

from bam_ray.control.observations import Alive, Broke, Stopped
from bam_ray.control.policies import FIRST_DELAY, PLACEMENT_DELAY
from bam_ray.errors import PlacementError
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.pipeline.states import Node, Retrying, Running, Waiting
from bam_ray.pipeline.tasks import Progress, Task, fewer_workers
from bam_ray.scheduling import elastic
from bam_ray.scheduling.nodes import NodeFacts
from tests.support.control.sample_recipe import sample_recipe
from tests.support.control.scripted_launcher import ControllerHarness, make_measurable_task, make_node, make_task

WHERE = Node("1", "one")


def group(workers: int, least: int | None = None, steps: int = 100) -> Task:
    """A branch of several workers, whose batch is twelve sequences."""
    return replace(make_task("g", steps=steps), workers=workers, fewer_workers=fewer_workers(workers, least, 12))


def cluster(*names: str) -> list[NodeFacts]:
    return [make_node(name) for name in names]


class Groups(ControllerHarness):
    """A controller that keeps with how many workers a task was placed."""

    def __init__(self, names: str, *tasks: Task) -> None:
        super().__init__(*tasks)
        self.launcher.known_nodes = cluster(*names)
        self.workers: list[int] = []
        place = self.launcher.place

        def placing(task: Task, avoid: frozenset[str], node_id: str | None = None) -> None:
            place(task, avoid, node_id)
            self.workers.append(task.workers)

        self.launcher.place = placing  # type: ignore[method-assign]

    def lose(self, names: str) -> None:
        """A group trains, then one of its ranks dies with its node; `names` are left."""
        self.step(g=Alive(WHERE, Progress(10, 100, checkpoint_step=10)))
        self.launcher.known_nodes = cluster(*names)
        self.step(g=Broke("the process or the node of rank 1 died", WHERE, Progress(12, 100, checkpoint_step=10)))


def test_fewer_workers_share_the_batch_and_as_much_of_the_experts_as_can_be() -> None:
    assert fewer_workers(4, None, 12) == ()
    assert fewer_workers(5, 2, 12) == (4, 3, 2)
    assert fewer_workers(8, 1, 24, expert_parallel=4) == (4, 6, 2, 3, 1)
    assert fewer_workers(4, 4, 12) == ()


def test_a_recipe_says_how_few_will_do() -> None:
    batches = [f"{stage}.training.batch_tokens=1024" for stage in ("seed", "branch", "mix")]
    tasks = task_graph(
        sample_recipe(
            *batches,
            "data.sequence_length=128",
            "mix.workers=4",
            "mix.min_workers=1",
            "branch.workers=4",
            "branch.overrides.law.workers=2",
        )
    )
    assert find_task(tasks, "mixtures", "bam").fewer_workers == (2, 1)
    batch_of_24 = ["mix.training.batch_tokens=3072", "data.sequence_length=128", "mix.workers=4", "mix.min_workers=1"]
    small = find_task(task_graph(sample_recipe(*batch_of_24)), "mixtures", "bam")
    assert small.fewer_workers == (2, 1), "not 3: what is balanced together would be 15 sequences, not 16"
    whole = find_task(
        task_graph(sample_recipe(*batch_of_24, "mix.training.micro_batch_sequences=6")), "mixtures", "bam"
    )
    assert whole.fewer_workers == (2, 3, 1), "all of a batch is balanced together"
    branches = [find_task(tasks, "branches", name) for name in ("code", "law")]
    assert [(task.workers, task.is_group, task.trains_alone, task.fewer_workers) for task in branches] == [
        (4, True, False, ()),
        (2, True, False, ()),
    ]
    same = {task.id for task in task_graph(sample_recipe(*batches, "data.sequence_length=128"))}
    assert {task.id for task in tasks} == same, "how many work on it is no part of an identity"


def test_a_group_goes_on_with_fewer_when_a_node_stays_away() -> None:
    harness = Groups("abcd", group(4, least=2))
    harness.step()
    assert harness.workers == [4]
    harness.lose("abc")
    harness.now += PLACEMENT_DELAY
    harness.step()
    assert isinstance(harness.controller.states["g"], Retrying)
    harness.now += elastic.PATIENCE
    harness.step()
    harness.step()
    assert harness.workers == [4, 3]
    assert harness.controller.history("g").said == "goes on with 3 of 4 workers"
    harness.lose("ab")
    harness.now += PLACEMENT_DELAY
    harness.step()
    assert harness.workers == [4, 3, 2], "the patience was spent already"
    harness.lose("abcd")
    harness.now += PLACEMENT_DELAY
    harness.step()
    assert harness.workers == [4, 3, 2, 4], "all are there again"
    assert harness.controller.history("g").no_place_since is None


def test_a_group_that_needs_every_node_goes_on_where_its_rank_died() -> None:
    harness = Groups("abc", group(3))
    harness.step()
    harness.step(g=Alive(Node("a", "a"), Progress(10, 100)))
    harness.step(g=Broke("the process of rank 0 died", Node("a", "a")))
    harness.now += FIRST_DELAY
    harness.step()
    assert harness.launcher.placed == [("g", frozenset()), ("g", frozenset())]


def test_a_group_keeps_off_a_node_where_the_others_are_free() -> None:
    harness = Groups("abcd", group(3))
    harness.step()
    harness.step(g=Alive(Node("a", "a"), Progress(10, 100)))
    harness.step(g=Broke("the process of rank 0 died", Node("a", "a")))
    harness.now += FIRST_DELAY
    harness.step()
    assert harness.launcher.placed[-1] == ("g", frozenset({"a"}))


def test_a_node_that_comes_back_in_time_is_waited_for() -> None:
    harness = Groups("abcd", group(4, least=2))
    harness.step()
    harness.lose("abc")
    harness.now += elastic.PATIENCE / 2
    harness.step()
    harness.launcher.known_nodes = cluster(*"abce")
    harness.now += PLACEMENT_DELAY
    harness.step()
    assert harness.workers == [4, 4]


@pytest.mark.parametrize(("least", "left"), [(None, "abc"), (3, "ab")])
def test_without_fewer_that_fit_it_waits(least: int | None, left: str) -> None:
    harness = Groups("abcd", group(4, least))
    harness.step()
    harness.lose(left)
    for _ in range(20):
        harness.now += elastic.PATIENCE
        harness.step()
    assert harness.workers == [4]
    assert "needs 4 × (1 CPU)" in str(harness.controller.states["g"])


def test_a_run_that_begins_on_too_few_nodes_is_refused_or_goes_on_with_fewer_when_no_more_have_come() -> None:
    harness = Groups("ab", group(4))
    harness.step()
    assert "needs 4 × (1 CPU)" in str(harness.controller.states["g"]), "it is said at once"
    harness.now += elastic.PATIENCE
    with pytest.raises(PlacementError, match=r"4 × \(1 CPU\), which the 2 living nodes can never give"):
        harness.step()
    harness = Groups("ab", group(4, least=2))
    harness.step()
    assert isinstance(harness.controller.states["g"], Retrying)
    harness.now += elastic.PATIENCE
    harness.step()
    assert harness.workers == [2]


def test_nodes_that_join_one_after_another_are_enough_even_where_one_is_away_again() -> None:
    harness = Groups("a", group(2))
    harness.step()
    harness.launcher.known_nodes = cluster("a", "b")
    harness.step()
    harness.launcher.known_nodes = cluster("a")
    harness.now += elastic.PATIENCE
    harness.step()
    harness.launcher.known_nodes = cluster("a", "b")
    harness.now += PLACEMENT_DELAY
    harness.step()
    assert harness.workers == [2]


def test_a_group_that_still_gathers_on_nodes_that_died_is_taken_back() -> None:
    harness = Groups("abcd", group(4, least=2))
    harness.step()
    harness.step(g=Alive(WHERE, Progress(0, 100, note="gathering 4 processes")))
    harness.launcher.known_nodes = cluster(*"abc")
    harness.now += elastic.PATIENCE / 2
    harness.step()
    assert isinstance(harness.controller.states["g"], Running)
    harness.now += elastic.PATIENCE
    harness.step()
    assert isinstance(harness.controller.states["g"], Waiting)
    assert harness.launcher.statuses == {}


def test_a_group_begins_whole_and_what_it_waits_for_is_kept_for_it() -> None:
    harness = Groups("ab", group(2, steps=50), make_measurable_task("solo"))
    harness.launcher.known_nodes = [make_node("a"), make_node("b", free=0.0)]
    harness.step()
    assert harness.launcher.names == []
    harness.launcher.known_nodes = cluster("a", "b")
    harness.step()
    assert harness.launcher.names == ["g"]


def test_a_group_leaves_in_time_whichever_of_its_nodes_will_be_taken_away() -> None:
    harness = Groups("abcd", group(2))
    harness.step()
    rank_0, ranks = Node("a", "a"), frozenset("ab")
    harness.step(g=Alive(rank_0, None, ranks))
    harness.launcher.known_nodes = [replace(each, leaving=each.id == "c") for each in cluster(*"abcd")]
    harness.step(g=Alive(rank_0, Progress(10, 100), ranks))
    assert harness.launcher.drained == [], "it has nothing on that node"
    harness.launcher.known_nodes = [replace(each, leaving=each.id == "b") for each in cluster(*"abcd")]
    harness.step(g=Alive(rank_0, Progress(20, 100), ranks))
    assert harness.launcher.drained == ["g"]
    harness.step(g=Stopped(rank_0, Progress(21, 100, checkpoint_step=21)))
    assert harness.launcher.names == ["g", "g"], "it begins again on the others"
    assert (harness.controller.history("g").ended[0].cause, harness.controller.history("g").failures) == ("moved", 0)
