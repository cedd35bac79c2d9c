"""Groups start with all their workers or not at all, and continue with fewer when nodes are gone for good."""

from dataclasses import replace

import pytest

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.observations import Alive, Crashed, Stopped
from bam_ray.control.policies import FIRST_DELAY, PLACEMENT_DELAY
from bam_ray.control.transitions import PlacedTask
from bam_ray.errors import PlacementError
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.pipeline.states import Node, Retrying, Running, Waiting
from bam_ray.pipeline.tasks import Progress, Task, fewer_workers
from bam_ray.scheduling import elastic
from bam_ray.scheduling.nodes import NodeFacts
from tests.support.control.sample_recipe import sample_recipe
from tests.support.control.scripted_launcher import ControllerHarness, make_measurable_task, make_node, make_task

RANK_0 = Node("1", "one")


def make_group(workers: int, least: int | None = None, steps: int = 100) -> Task:
    """Return a branch of several workers, whose batch is twelve sequences."""
    return replace(make_task("g", steps=steps), workers=workers, fewer_workers=fewer_workers(workers, least, 12))


def make_nodes(*names: str) -> list[NodeFacts]:
    """Return one free node for each name."""
    return [make_node(name) for name in names]


class GroupHarness(ControllerHarness):
    """A controller that records the number of workers of every placed task."""

    def __init__(self, names: str, *tasks: Task) -> None:
        super().__init__(*tasks)
        self.launcher.known_nodes = make_nodes(*names)
        self.workers: list[int] = []
        place = self.launcher.place

        def record_and_place(placed: PlacedTask, avoid: frozenset[str], node_id: str | None = None) -> None:
            place(placed, avoid, node_id)
            self.workers.append(placed.task.workers)

        self.launcher.place = record_and_place  # type: ignore[method-assign]

    def lose(self, names: str) -> None:
        """Let the group train, then lose one of its ranks with its node; the nodes `names` are left."""
        self.step(g=Alive(RANK_0, Progress(10, 100, checkpoint_step=10)))
        self.launcher.known_nodes = make_nodes(*names)
        self.step(g=Crashed("the process or the node of rank 1 died", RANK_0, Progress(12, 100, checkpoint_step=10)))


def test_fewer_workers_divide_the_batch_and_keep_expert_shards() -> None:
    assert fewer_workers(4, None, 12) == ()
    assert fewer_workers(5, 2, 12) == (4, 3, 2)
    assert fewer_workers(8, 1, 24, expert_parallel=4) == (4, 6, 2, 3, 1)
    assert fewer_workers(4, 4, 12) == ()


def test_tasks_list_the_acceptable_numbers_of_workers() -> None:
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
    assert find_task(tasks, ArtifactKind.MIXTURES, "bam").fewer_workers == (2, 1)
    batch_of_24 = ["mix.training.batch_tokens=3072", "data.sequence_length=128", "mix.workers=4", "mix.min_workers=1"]
    small = find_task(task_graph(sample_recipe(*batch_of_24)), "mixtures", "bam")
    assert small.fewer_workers == (2, 1), "3 workers would balance over 15 sequences instead of 16"
    whole = find_task(
        task_graph(sample_recipe(*batch_of_24, "mix.training.micro_batch_sequences=6")), "mixtures", "bam"
    )
    assert whole.fewer_workers == (2, 3, 1), "the whole batch is balanced together"
    branches = [find_task(tasks, ArtifactKind.BRANCHES, name) for name in ("code", "law")]
    assert [(task.workers, task.is_group, task.trains_alone, task.fewer_workers) for task in branches] == [
        (4, True, False, ()),
        (2, True, False, ()),
    ]
    ids = {task.id for task in task_graph(sample_recipe(*batches, "data.sequence_length=128"))}
    assert {task.id for task in tasks} == ids, "the number of workers is not part of an id"


def test_a_group_continues_with_fewer_workers_after_a_node_is_lost() -> None:
    harness = GroupHarness("abcd", make_group(4, least=2))
    harness.step()
    assert harness.workers == [4]
    harness.lose("abc")
    harness.now += PLACEMENT_DELAY
    harness.step()
    assert isinstance(harness.controller.states["g"], Retrying)
    harness.now += elastic.SHRINK_TIMEOUT
    harness.step()
    harness.step()
    assert harness.workers == [4, 3]
    assert harness.controller.history("g").message == "continues with 3 of 4 workers"
    harness.lose("ab")
    harness.now += PLACEMENT_DELAY
    harness.step()
    assert harness.workers == [4, 3, 2], "the timeout has passed already"
    harness.lose("abcd")
    harness.now += PLACEMENT_DELAY
    harness.step()
    assert harness.workers == [4, 3, 2, 4], "all nodes are back"
    assert harness.controller.history("g").no_capacity_since is None


def test_a_group_that_needs_every_node_returns_to_a_failed_node() -> None:
    harness = GroupHarness("abc", make_group(3))
    harness.step()
    harness.step(g=Alive(Node("a", "a"), Progress(10, 100)))
    harness.step(g=Crashed("the process of rank 0 died", Node("a", "a")))
    harness.now += FIRST_DELAY
    harness.step()
    assert harness.launcher.placed == [("g", frozenset()), ("g", frozenset())]


def test_a_group_avoids_a_node_while_the_others_are_free() -> None:
    harness = GroupHarness("abcd", make_group(3))
    harness.step()
    harness.step(g=Alive(Node("a", "a"), Progress(10, 100)))
    harness.step(g=Crashed("the process of rank 0 died", Node("a", "a")))
    harness.now += FIRST_DELAY
    harness.step()
    assert harness.launcher.placed[-1] == ("g", frozenset({"a"}))


def test_a_group_waits_for_a_node_that_returns_in_time() -> None:
    harness = GroupHarness("abcd", make_group(4, least=2))
    harness.step()
    harness.lose("abc")
    harness.now += elastic.SHRINK_TIMEOUT / 2
    harness.step()
    harness.launcher.known_nodes = make_nodes(*"abce")
    harness.now += PLACEMENT_DELAY
    harness.step()
    assert harness.workers == [4, 4]


@pytest.mark.parametrize(("least", "left"), [(None, "abc"), (3, "ab")])
def test_a_group_waits_if_no_acceptable_number_fits(least: int | None, left: str) -> None:
    harness = GroupHarness("abcd", make_group(4, least))
    harness.step()
    harness.lose(left)
    for _ in range(20):
        harness.now += elastic.SHRINK_TIMEOUT
        harness.step()
    assert harness.workers == [4]
    assert "(4 × (1 CPU))" in str(harness.controller.states["g"])


def test_a_start_on_too_few_nodes_fails_or_continues_with_fewer() -> None:
    harness = GroupHarness("ab", make_group(4))
    harness.step()
    assert "(4 × (1 CPU))" in str(harness.controller.states["g"]), "it is reported at once"
    harness.now += elastic.SHRINK_TIMEOUT
    with pytest.raises(
        PlacementError, match=r"no set of nodes can satisfy \S+ \(4 × \(1 CPU\)\); the cluster has 2 living nodes"
    ):
        harness.step()
    harness = GroupHarness("ab", make_group(4, least=2))
    harness.step()
    assert isinstance(harness.controller.states["g"], Retrying)
    harness.now += elastic.SHRINK_TIMEOUT
    harness.step()
    assert harness.workers == [2]


def test_nodes_that_joined_once_count_for_feasibility() -> None:
    harness = GroupHarness("a", make_group(2))
    harness.step()
    harness.launcher.known_nodes = make_nodes("a", "b")
    harness.step()
    harness.launcher.known_nodes = make_nodes("a")
    harness.now += elastic.SHRINK_TIMEOUT
    harness.step()
    harness.launcher.known_nodes = make_nodes("a", "b")
    harness.now += PLACEMENT_DELAY
    harness.step()
    assert harness.workers == [2]


def test_a_gathering_group_is_withdrawn_when_its_nodes_die() -> None:
    harness = GroupHarness("abcd", make_group(4, least=2))
    harness.step()
    harness.step(g=Alive(RANK_0, Progress(0, 100, note="gathering 4 processes")))
    harness.launcher.known_nodes = make_nodes(*"abc")
    harness.now += elastic.SHRINK_TIMEOUT / 2
    harness.step()
    assert isinstance(harness.controller.states["g"], Running)
    harness.now += elastic.SHRINK_TIMEOUT
    harness.step()
    assert isinstance(harness.controller.states["g"], Waiting)
    assert harness.launcher.statuses == {}


def test_a_waiting_group_keeps_its_nodes_reserved() -> None:
    harness = GroupHarness("ab", make_group(2, steps=50), make_measurable_task("solo"))
    harness.launcher.known_nodes = [make_node("a"), make_node("b", free=0.0)]
    harness.step()
    assert harness.launcher.names == []
    harness.launcher.known_nodes = make_nodes("a", "b")
    harness.step()
    assert harness.launcher.names == ["g"]


def test_a_group_moves_when_any_of_its_nodes_will_be_taken_away() -> None:
    harness = GroupHarness("abcd", make_group(2))
    harness.step()
    first, ranks = Node("a", "a"), frozenset("ab")
    harness.step(g=Alive(first, None, ranks))
    harness.launcher.known_nodes = [replace(each, leaving=each.id == "c") for each in make_nodes(*"abcd")]
    harness.step(g=Alive(first, Progress(10, 100), ranks))
    assert harness.launcher.drained == [], "it has no rank on that node"
    harness.launcher.known_nodes = [replace(each, leaving=each.id == "b") for each in make_nodes(*"abcd")]
    harness.step(g=Alive(first, Progress(20, 100), ranks))
    assert harness.launcher.drained == ["g"]
    harness.step(g=Stopped(first, Progress(21, 100, checkpoint_step=21)))
    assert harness.launcher.names == ["g", "g"], "it starts again on the others"
    history = harness.controller.history("g")
    assert (history.past_attempts[0].cause, history.failures) == ("moved", 0)
