"""Simulated runs: the real controller over simulated nodes and time."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.controller import Controller
from bam_ray.control.observations import Alive, AttemptStatus, Crashed
from bam_ray.errors import PlacementError, SettingsError
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.pipeline.tasks import Task
from bam_ray.planning.cluster_file import load_cluster
from bam_ray.planning.simulated_launcher import SimulatedLauncher
from bam_ray.scheduling.matching import bound
from bam_ray.settings import Needs
from tests.support.control.sample_recipe import sample_recipe
from tests.support.planning.simulated_run import make_cluster, simulate_tasks

CLUSTERS = sorted((Path(__file__).parents[2] / "recipes" / "clusters").glob("*.yaml"))
MIXED = {"fast": (2, 4000.0), "middle": (2, 2000.0), "slow": (4, 1000.0)}


def branches(count: int, steps: int, needs: Needs | None = None) -> list[Task]:
    return [
        Task(
            ArtifactKind.BRANCHES,
            f"b{i}",
            f"b{i}",
            (),
            needs or Needs(),
            total_steps=steps,
            model="dense",
            step_tokens=1000,
        )
        for i in range(count)
    ]


def least_seconds(tasks: list[Task], nodes: dict[str, tuple[int, float]]) -> float:
    speeds = [speed for count, speed in nodes.values() for _ in range(count)]
    return bound([task.total_steps * task.step_tokens for task in tasks], speeds)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_shipped_clusters_load(path: Path) -> None:
    assert load_cluster(path).name == path.stem


def test_four_clusters_are_shipped() -> None:
    assert [path.stem for path in CLUSTERS] == ["aws", "eight-mixed-nodes", "laptop", "spot-200"]


@pytest.mark.parametrize(
    ("count", "nodes"),
    [
        (12, MIXED),
        (8, MIXED),
        (4, {"one": (2, 1000.0), "half": (1, 500.0), "quarter": (1, 250.0)}),
        (12, {"same": (8, 1000.0)}),
    ],
)
def test_the_makespan_is_near_the_lower_bound(count: int, nodes: dict[str, tuple[int, float]]) -> None:
    tasks = branches(count, 28800)
    result = simulate_tasks(tasks, make_cluster(nodes))
    assert result.outcome == "finished"
    assert 1.0 <= result.seconds / least_seconds(tasks, nodes) <= 1.05


def test_branches_are_committed_despite_preemptions() -> None:
    tasks = branches(12, 28800)
    result = simulate_tasks(tasks, make_cluster(MIXED, preemptions_per_hour=0.3))
    assert result.outcome == "finished"
    assert result.preemptions >= 3
    causes = [attempt.cause for attempts in result.attempts.values() for attempt in attempts]
    assert causes.count("committed") == 12
    assert any("was preempted" in cause for cause in causes)
    assert result.moves > 0
    assert result.seconds >= least_seconds(tasks, MIXED)


class OneKill(SimulatedLauncher):
    """A launcher that kills the process of `b0` once; its node stays alive."""

    killed = False

    def poll(self) -> dict[str, AttemptStatus]:
        statuses = super().poll()
        if self.now >= 100 and not self.killed:
            self.killed = True
            statuses["b0"] = Crashed("its process died", cast(Alive, statuses["b0"]).node)
        return statuses


def test_a_killed_process_resumes_at_once_if_other_nodes_are_busy() -> None:
    seconds = {}
    for kind in (SimulatedLauncher, OneKill):
        store = MemoryStore()
        nodes = make_cluster({"a": (1, 1000.0), "b": (1, 1000.0)})
        launcher = kind(nodes, store, lambda task, group: group.tokens_per_second, {}, seed=0)
        controller = Controller(branches(2, 3000), store, launcher, clock=partial(getattr, launcher, "now"))
        while controller.outcome() == "running" and launcher.now < 10000:
            controller.step()
            launcher.advance(launcher.now + 1)
        seconds[kind] = launcher.now
    assert seconds[OneKill] < seconds[SimulatedLauncher] + 150, "the lost steps, a start and a delay"


def test_equal_seeds_give_equal_runs() -> None:
    tasks, cluster = branches(12, 9000), make_cluster(MIXED, preemptions_per_hour=0.5)
    assert simulate_tasks(tasks, cluster, seed=1) == simulate_tasks(tasks, cluster, seed=1)
    assert simulate_tasks(tasks, cluster, seed=1) != simulate_tasks(tasks, cluster, seed=2)


def test_a_branch_that_no_node_can_hold_is_an_error() -> None:
    with pytest.raises(PlacementError, match=r"satisfy branches/b0 \(1 CPU, 1 GPU\); the cluster has 8 living nodes "):
        simulate_tasks(branches(2, 100, Needs(gpus=1)), make_cluster(MIXED))


def test_a_group_is_as_fast_as_its_slowest_worker() -> None:
    task = Task(
        ArtifactKind.MIXTURES, "bam", "bam", (), Needs(), workers=4, total_steps=1000, model="bam", step_tokens=4000
    )
    result = simulate_tasks([task], make_cluster({"fast": (3, 2000.0), "slow": (1, 500.0)}))
    assert result.seconds == pytest.approx(30 + 4_000_000 / (4 * 500) + 15, abs=2)


LONG = ["branch.training.tokens=1_000_000", "mix.training.tokens=500_000"]
START_AND_CHECKPOINT = 45.0  # of `make_cluster`


@pytest.mark.parametrize("compare", ["{}", "{dense: [1, 0.25], workers: 2}"])
@pytest.mark.parametrize(
    "nodes",
    [
        {"a": (2, 1000.0)},
        {"a": (3, 1000.0)},
        {"a": (4, 1000.0)},
        {"a": (1, 2000.0), "b": (3, 500.0)},
    ],
    ids=["two", "three", "four", "one-fast"],
)
def test_controls_do_not_delay_mixtures(nodes: dict[str, tuple[int, float]], compare: str) -> None:
    cluster = make_cluster(nodes)
    ends = []
    for more in ([], [f"compare={compare}"]):
        tasks = task_graph(sample_recipe(*LONG, *more))
        result = simulate_tasks(tasks, cluster)
        assert result.outcome == "finished"
        ends.append(result.span([task.id for task in tasks if task.kind == ArtifactKind.MIXTURES])[1])
    assert ends[1] <= ends[0] + START_AND_CHECKPOINT, "a control may still have to write its checkpoint"


def test_a_control_uses_a_node_that_nothing_else_needs() -> None:
    tasks = task_graph(sample_recipe(*LONG, "compare={}"))
    result = simulate_tasks(tasks, make_cluster({"a": (6, 1000.0)}))
    branch, control = (find_task(tasks, *each) for each in [("branches", "code"), ("controls", "dense")])
    (only,) = result.attempts[control.id]
    assert only.cause == "committed"
    assert only.placed == result.attempts[branch.id][0].placed


def test_a_control_continues_after_it_has_made_way() -> None:
    tasks = task_graph(sample_recipe(*LONG, "compare={}"))
    control = find_task(tasks, ArtifactKind.CONTROLS, "dense")
    first, last = simulate_tasks(tasks, make_cluster({"a": (4, 1000.0)})).attempts[control.id]
    assert (first.cause, last.cause) == ("made way for mixtures/btx", "committed")
    seconds = control.total_steps * control.step_tokens / 1000.0
    assert first.ended - first.placed + last.ended - last.placed == pytest.approx(
        seconds + 2 * START_AND_CHECKPOINT, abs=1
    )


def test_a_control_on_a_node_that_nobody_waits_for_stays() -> None:
    needs = "{cpus: 1, labels: {speed: fast}}"
    tasks = task_graph(sample_recipe(*LONG, "compare={needs: {labels: {speed: slow}}}", f"mix.needs={needs}"))
    control = find_task(tasks, ArtifactKind.CONTROLS, "dense")
    for kind in ("corpora", "seeds", "branches", "upcycled"):
        tasks = [replace(task, needs=Needs(labels={"speed": "fast"})) if task.kind == kind else task for task in tasks]
    result = simulate_tasks(tasks, make_cluster({"fast": (2, 1000.0), "slow": (1, 1000.0)}))
    assert [attempt.cause for attempt in result.attempts[control.id]] == ["committed"]


def test_a_node_has_exactly_one_speed(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    path.write_text("{name: none, nodes: {a: {count: 1}}}")
    with pytest.raises(SettingsError, match=r"cluster file .*: nodes\.a: give exactly one of"):
        load_cluster(path)
    with pytest.raises(SettingsError, match=r"cluster file nowhere\.yaml cannot be read"):
        load_cluster("nowhere.yaml")
