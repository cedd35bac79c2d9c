"""Groups: placed whole or not at all, and with fewer workers where nodes are gone for good."""

from dataclasses import replace

import pytest
from test_controller import Scene, make, node, trained
from test_graph import recipe

from bam_ray.control.observations import Alive, Broke, Stopped
from bam_ray.control.policies import FIRST_DELAY, PLACEMENT_DELAY
from bam_ray.errors import PlacementError
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.pipeline.states import Node, Retrying, Running, Waiting
from bam_ray.pipeline.tasks import Progress, Task, fewer_workers
from bam_ray.scheduling import elastic
from bam_ray.scheduling.nodes import NodeFacts

WHERE = Node("1", "one")


def group(workers: int, least: int | None = None, steps: int = 100) -> Task:
    """A branch of several workers, whose batch is twelve sequences."""
    return replace(make("g", steps=steps), workers=workers, fewer_workers=fewer_workers(workers, least, 12))


def cluster(*names: str) -> list[NodeFacts]:
    return [node(name) for name in names]


class Groups(Scene):
    """A scene that keeps with how many workers a task was placed."""

    def __init__(self, names: str, *tasks: Task) -> None:
        super().__init__(*tasks)
        self.script.there = cluster(*names)
        self.workers: list[int] = []
        place = self.script.place

        def placing(task: Task, avoid: frozenset[str], node_id: str | None = None) -> None:
            place(task, avoid, node_id)
            self.workers.append(task.workers)

        self.script.place = placing  # type: ignore[method-assign]

    def lose(self, names: str) -> None:
        """A group trains, then one of its ranks dies with its node; `names` are left."""
        self.step(g=Alive(WHERE, Progress(10, 100, checkpoint_step=10)))
        self.script.there = cluster(*names)
        self.step(g=Broke("the process or the node of rank 1 died", WHERE, Progress(12, 100, checkpoint_step=10)))


def test_fewer_workers_share_the_batch_and_as_much_of_the_experts_as_can_be() -> None:
    assert fewer_workers(4, None, 12) == ()
    assert fewer_workers(5, 2, 12) == (4, 3, 2)
    assert fewer_workers(8, 1, 24, expert_parallel=4) == (4, 6, 2, 3, 1)
    assert fewer_workers(4, 4, 12) == ()


def test_a_recipe_says_how_few_will_do() -> None:
    batches = [f"{stage}.training.batch_tokens=1024" for stage in ("seed", "branch", "mix")]
    tasks = task_graph(
        recipe(
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
    small = find_task(task_graph(recipe(*batch_of_24)), "mixtures", "bam")
    assert small.fewer_workers == (2, 1), "not 3: what is balanced together would be 15 sequences, not 16"
    whole = find_task(task_graph(recipe(*batch_of_24, "mix.training.micro_batch_sequences=6")), "mixtures", "bam")
    assert whole.fewer_workers == (2, 3, 1), "all of a batch is balanced together"
    branches = [find_task(tasks, "branches", name) for name in ("code", "law")]
    assert [(task.workers, task.is_group, task.trains_alone, task.fewer_workers) for task in branches] == [
        (4, True, False, ()),
        (2, True, False, ()),
    ]
    same = {task.id for task in task_graph(recipe(*batches, "data.sequence_length=128"))}
    assert {task.id for task in tasks} == same, "how many work on it is no part of an identity"


def test_a_group_goes_on_with_fewer_when_a_node_stays_away() -> None:
    scene = Groups("abcd", group(4, least=2))
    scene.step()
    assert scene.workers == [4]
    scene.lose("abc")
    scene.now += PLACEMENT_DELAY
    scene.step()
    assert isinstance(scene.controller.states["g"], Retrying)
    scene.now += elastic.PATIENCE
    scene.step()
    scene.step()
    assert scene.workers == [4, 3]
    assert scene.controller.history("g").said == "goes on with 3 of 4 workers"
    scene.lose("ab")
    scene.now += PLACEMENT_DELAY
    scene.step()
    assert scene.workers == [4, 3, 2], "the patience was spent already"
    scene.lose("abcd")
    scene.now += PLACEMENT_DELAY
    scene.step()
    assert scene.workers == [4, 3, 2, 4], "all are there again"
    assert scene.controller.history("g").no_place_since is None


def test_a_group_that_needs_every_node_goes_on_where_its_rank_died() -> None:
    scene = Groups("abc", group(3))
    scene.step()
    scene.step(g=Alive(Node("a", "a"), Progress(10, 100)))
    scene.step(g=Broke("the process of rank 0 died", Node("a", "a")))
    scene.now += FIRST_DELAY
    scene.step()
    assert scene.script.placed == [("g", frozenset()), ("g", frozenset())]


def test_a_group_keeps_off_a_node_where_the_others_are_free() -> None:
    scene = Groups("abcd", group(3))
    scene.step()
    scene.step(g=Alive(Node("a", "a"), Progress(10, 100)))
    scene.step(g=Broke("the process of rank 0 died", Node("a", "a")))
    scene.now += FIRST_DELAY
    scene.step()
    assert scene.script.placed[-1] == ("g", frozenset({"a"}))


def test_a_node_that_comes_back_in_time_is_waited_for() -> None:
    scene = Groups("abcd", group(4, least=2))
    scene.step()
    scene.lose("abc")
    scene.now += elastic.PATIENCE / 2
    scene.step()
    scene.script.there = cluster(*"abce")
    scene.now += PLACEMENT_DELAY
    scene.step()
    assert scene.workers == [4, 4]


@pytest.mark.parametrize(("least", "left"), [(None, "abc"), (3, "ab")])
def test_without_fewer_that_fit_it_waits(least: int | None, left: str) -> None:
    scene = Groups("abcd", group(4, least))
    scene.step()
    scene.lose(left)
    for _ in range(20):
        scene.now += elastic.PATIENCE
        scene.step()
    assert scene.workers == [4]
    assert "needs 4 × (1 CPU)" in str(scene.controller.states["g"])


def test_a_run_that_begins_on_too_few_nodes_is_refused_or_goes_on_with_fewer_when_no_more_have_come() -> None:
    scene = Groups("ab", group(4))
    scene.step()
    assert "needs 4 × (1 CPU)" in str(scene.controller.states["g"]), "it is said at once"
    scene.now += elastic.PATIENCE
    with pytest.raises(PlacementError, match=r"4 × \(1 CPU\), which the 2 living nodes can never give"):
        scene.step()
    scene = Groups("ab", group(4, least=2))
    scene.step()
    assert isinstance(scene.controller.states["g"], Retrying)
    scene.now += elastic.PATIENCE
    scene.step()
    assert scene.workers == [2]


def test_nodes_that_join_one_after_another_are_enough_even_where_one_is_away_again() -> None:
    scene = Groups("a", group(2))
    scene.step()
    scene.script.there = cluster("a", "b")
    scene.step()
    scene.script.there = cluster("a")
    scene.now += elastic.PATIENCE
    scene.step()
    scene.script.there = cluster("a", "b")
    scene.now += PLACEMENT_DELAY
    scene.step()
    assert scene.workers == [2]


def test_a_group_that_still_gathers_on_nodes_that_died_is_taken_back() -> None:
    scene = Groups("abcd", group(4, least=2))
    scene.step()
    scene.step(g=Alive(WHERE, Progress(0, 100, note="gathering 4 processes")))
    scene.script.there = cluster(*"abc")
    scene.now += elastic.PATIENCE / 2
    scene.step()
    assert isinstance(scene.controller.states["g"], Running)
    scene.now += elastic.PATIENCE
    scene.step()
    assert isinstance(scene.controller.states["g"], Waiting)
    assert scene.script.sightings == {}


def test_a_group_begins_whole_and_what_it_waits_for_is_kept_for_it() -> None:
    scene = Groups("ab", group(2, steps=50), trained("solo"))
    scene.script.there = [node("a"), node("b", free=0.0)]
    scene.step()
    assert scene.script.names == []
    scene.script.there = cluster("a", "b")
    scene.step()
    assert scene.script.names == ["g"]


def test_a_group_leaves_in_time_whichever_of_its_nodes_will_be_taken_away() -> None:
    scene = Groups("abcd", group(2))
    scene.step()
    rank_0, ranks = Node("a", "a"), frozenset("ab")
    scene.step(g=Alive(rank_0, None, ranks))
    scene.script.there = [replace(each, leaving=each.id == "c") for each in cluster(*"abcd")]
    scene.step(g=Alive(rank_0, Progress(10, 100), ranks))
    assert scene.script.drained == [], "it has nothing on that node"
    scene.script.there = [replace(each, leaving=each.id == "b") for each in cluster(*"abcd")]
    scene.step(g=Alive(rank_0, Progress(20, 100), ranks))
    assert scene.script.drained == ["g"]
    scene.step(g=Stopped(rank_0, Progress(21, 100, checkpoint_step=21)))
    assert scene.script.names == ["g", "g"], "it begins again on the others"
    assert (scene.controller.history("g").ended[0].cause, scene.controller.history("g").failures) == ("moved", 0)
