"""The controller on a Ray cluster with a head and three nodes, whose nodes and workers are killed.

The stages are stubs that do not train. Everything else is real: actors, Ray Train, the blob store and signals. A stub
records every step in the blob store, so that steps that ran twice can be counted.
"""

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.control import status
from bam_ray.control.controller import Controller
from bam_ray.errors import PlacementError, SettingsError
from bam_ray.on_ray.cluster import living_nodes
from bam_ray.on_ray.launcher import RayLauncher
from bam_ray.on_ray.submit import INTERRUPTED, follow, submit
from bam_ray.on_ray.work import StageFunctions
from bam_ray.pipeline.graph import find_task, subset, task_graph
from bam_ray.pipeline.run import PipelineRun
from bam_ray.pipeline.states import Committed, Failed, Node, Running
from bam_ray.scheduling.nodes import label_selector, satisfiable_request, selects
from bam_ray.settings import Needs, Recipe, parse_recipe
from tests.support.cluster.ray_cluster import add_node
from tests.support.cluster.stub_stages import (
    RECIPE,
    STUB_STAGES,
    failing_law_stage,
    failing_rank_one,
    stub_engine,
    stub_rank,
    stub_stage,
    write_project,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return parse_recipe(RECIPE.replace("STORE", str(tmp_path / "store")), "test")


@pytest.fixture
def upcycled(recipe: Recipe) -> Recipe:
    """Return a recipe whose upcycled models are committed."""
    store = FolderStore(recipe.store.uri)
    for task in subset(task_graph(recipe), ["upcycled"]):
        Artifact(store, task.kind, task.id).commit(Manifest(id=task.id, kind=task.kind, name=task.name))
    return recipe


@pytest.fixture
def seeded(recipe: Recipe) -> Recipe:
    """Return a recipe whose branches can start, because the seed is committed."""
    store = FolderStore(recipe.store.uri)
    for task in subset(task_graph(recipe), ["seeds"]):
        Artifact(store, task.kind, task.id).commit(Manifest(id=task.id, kind=task.kind, name=task.name))
    return recipe


class BackgroundRun:
    """A run on the cluster whose controller works on a thread."""

    def __init__(self, recipe: Recipe, kinds: list[ArtifactKind], functions: StageFunctions = STUB_STAGES) -> None:
        self.store = FolderStore(recipe.store.uri)
        run = PipelineRun.of(recipe, self.store)
        self.launcher = RayLauncher(run, stub_engine, functions)
        self.tasks = subset(run.tasks, kinds)
        self.controller = Controller(self.tasks, self.store, self.launcher)
        self.outcome: str | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self.controller.run(pause=0.1)
        finally:
            self.launcher.close()

    def state(self, kind: ArtifactKind, name: str) -> Any:
        return self.controller.states[find_task(self.tasks, kind, name).id]

    def node(self, kind: ArtifactKind, name: str, steps: int = 3) -> Node:
        """Return the node of a task when it has made some steps."""

        def runs() -> bool:
            state = self.state(kind, name)
            return isinstance(state, Running) and state.progress.step >= steps

        wait_for(runs, lambda: str(self.state(kind, name)))
        node: Node = self.state(kind, name).node
        return node

    def done(self, kind: ArtifactKind, name: str) -> list[list[Any]]:
        """Return [node id, process id] of every step of a task."""
        steps: list[list[Any]] = json.loads(self.store.get(f"steps/{kind}-{name}.json"))
        return steps

    def join(self) -> str | None:
        self._thread.join(timeout=200)
        assert not self._thread.is_alive()
        return self.outcome


def wait_for(condition: Callable[[], bool], message: Callable[[], str], seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, message()
        time.sleep(0.1)


def test_branches_run_in_parallel_and_survive_a_node(cluster: Cluster, seeded: Recipe) -> None:
    # A worker may continue for seconds after its node died, so the branches must take longer than that
    long = seeded.branch.training.model_copy(update={"tokens": 300 * seeded.branch.training.batch_tokens})
    recipe = seeded.model_copy(update={"branch": seeded.branch.model_copy(update={"training": long})})
    run = BackgroundRun(recipe, ["branches"])
    nodes = {domain: run.node("branches", domain).id for domain in recipe.branch.domains}
    assert len(set(nodes.values())) == 3, "spread over the nodes"
    victim = next(node for node in cluster.list_all_nodes() if node.node_id == nodes["code"])
    raylet = victim.all_processes["raylet"][0].process
    before = len(run.done("branches", "code"))
    os.kill(raylet.pid, signal.SIGKILL)
    try:
        assert run.join() == "finished"
    finally:
        cluster.remove_node(victim, allow_graceful=False)
        add_node(cluster)
    code = [node for node, _ in run.done("branches", "code")]
    assert len(code) == 300
    moved = code.index(code[-1])
    assert code[-1] != nodes["code"], "the branch resumes on another node"
    assert moved >= before, "it resumes from the last checkpoint"
    assert code == [nodes["code"]] * moved + [code[-1]] * (300 - moved), "no step runs on both nodes"
    assert {node for node, _ in run.done("branches", "law")} == {nodes["law"]}, "the other branches do not move"
    assert run.controller.attempts(find_task(run.tasks, "branches", "code").id) == 2


def test_a_killed_worker_is_replaced(cluster: Cluster, seeded: Recipe) -> None:
    run = BackgroundRun(seeded, ["branches"])
    run.node("branches", "law")
    pid = run.done("branches", "law")[-1][1]
    os.kill(pid, signal.SIGKILL)
    assert run.join() == "finished"
    steps = run.done("branches", "law")
    assert len(steps) == 40
    assert len({process for _, process in steps}) == 2


def test_a_failed_branch_does_not_stop_the_others(cluster: Cluster, seeded: Recipe) -> None:
    recipe = seeded.model_copy(update={"branch": seeded.branch.model_copy(update={"max_attempts": 2})})
    run = BackgroundRun(recipe, ["upcycled"], StageFunctions(failing_law_stage, stub_rank))
    assert run.join() == "failed"
    law = run.state("branches", "law")
    assert isinstance(law, Failed)
    assert law.error == "ValueError: the law is an ass (2 attempts)"
    assert any("in failing_law_stage" in line for line in law.log)
    assert law.node is not None
    assert isinstance(run.state("branches", "code"), Committed)
    assert isinstance(run.state("branches", "general"), Committed)
    assert status.build("tiny", run.controller).rows[-1].note == "branches/law failed"


def test_a_label_that_no_node_has_is_an_error_at_once(cluster: Cluster, seeded: Recipe) -> None:
    needs = seeded.branch.needs.model_copy(update={"labels": {"gpu": "in(A100,H100)"}})
    recipe = seeded.model_copy(update={"branch": seeded.branch.model_copy(update={"needs": needs})})
    store = FolderStore(recipe.store.uri)
    run = PipelineRun.of(recipe, store)
    launcher = RayLauncher(run, stub_engine, STUB_STAGES)
    with pytest.raises(PlacementError) as caught:
        Controller(subset(run.tasks, ["branches"]), store, launcher).step()
    assert str(caught.value).endswith(
        " (1 CPU, labels gpu=in(A100,H100)); the cluster has 4 living nodes "
        "(3 × 2 CPU, kind=plain; 1 × 0 CPU): change branch.needs (or its override) or add nodes"
    )


def test_a_branch_moves_to_a_faster_node(cluster: Cluster, seeded: Recipe) -> None:
    """Two branches run on a fast and a slow node. The slow one moves to the fast node at the latest when that is free.

    Both use a fallback of their resource request.
    """
    fallback = {"cpus": 1, "labels": {"seconds": "in(0.05,1.0)"}}
    needs = Needs.model_validate({"cpus": 1, "gpus": 1, "fallback": [fallback]})
    two = {"domains": ["code", "law"], "needs": needs}
    two["training"] = seeded.branch.training.model_copy(update={"tokens": 300 * seeded.branch.training.batch_tokens})
    recipe = seeded.model_copy(update={"branch": seeded.branch.model_copy(update=two)})
    nodes = [
        cluster.add_node(num_cpus=1, object_store_memory=100 << 20, labels={"seconds": seconds})
        for seconds in ("0.05", "1.0")
    ]
    try:
        run = BackgroundRun(recipe, ["branches"])
        assert run.join() == "finished"
    finally:
        for node in nodes:
            cluster.remove_node(node)
    fast, slow = (node.node_id for node in nodes)
    steps = {name: [node for node, _ in run.done("branches", name)] for name in ("code", "law")}
    behind = next(name for name in steps if steps[name][0] == slow)
    assert steps[behind][-1] == fast, "the slow branch ends on the fast node"
    histories = {task.name: run.controller.history(task.id) for task in run.tasks if task.kind == "branches"}
    for name, nodes_of_steps in steps.items():
        assert len(nodes_of_steps) == 300, "no step is repeated"
        assert set(nodes_of_steps) <= {fast, slow}
        changes = sum(here != there for here, there in itertools.pairwise(nodes_of_steps))
        causes = [ended.cause for ended in histories[name].past_attempts]
        assert causes == ["moved"] * changes + ["committed"]
        assert (
            histories[name].message
            == "no node can satisfy 1 CPU, 1 GPU: using fallback 1, 1 CPU, labels seconds=in(0.05,1.0)"
        )


def test_avoided_nodes_are_excluded_if_others_suffice(cluster: Cluster, recipe: Recipe) -> None:
    task = find_task(task_graph(recipe), "branches", "law")
    nodes = living_nodes()
    workers = [node for node in nodes if node.resources.get("CPU")]
    one, *others = workers
    selector = label_selector(task, frozenset({one.id, "long gone"}), nodes)
    assert {node.id for node in nodes if selects(selector, node.labels)} == {node.id for node in nodes} - {one.id}
    assert label_selector(task, frozenset(node.id for node in workers), nodes) == {}
    wide = find_task(
        task_graph(recipe.model_copy(update={"mix": recipe.mix.model_copy(update={"workers": 6})})), "mixtures", "bam"
    )
    assert label_selector(wide, frozenset({one.id}), nodes) == {}, "six workers need all three nodes"
    with pytest.raises(PlacementError, match="6 × \\(1 CPU\\)"):
        satisfiable_request(wide, others)


def test_a_process_group_is_stopped_and_resumed(cluster: Cluster, upcycled: Recipe) -> None:
    run = BackgroundRun(upcycled, ["mixtures"])
    node = run.node("mixtures", "bam")
    assert node.id in {facts.id for facts in living_nodes() if facts.resources.get("CPU")}, "the node of rank 0"
    run.controller.stop()
    assert run.join() == "interrupted"
    assert run.store.exists("drained"), "rank 0 had the time to write its checkpoint"
    before = run.done("mixtures", "bam")
    assert 3 <= len(before) < 60
    again = BackgroundRun(upcycled, ["mixtures"])
    assert again.join() == "finished"
    after = again.done("mixtures", "bam")
    assert after[: len(before)] == before
    assert len(after) == 60
    assert again.state("mixtures", "bam").progress.step == 60


def test_a_process_group_survives_the_death_of_a_rank(cluster: Cluster, upcycled: Recipe) -> None:
    run = BackgroundRun(upcycled, ["mixtures"])
    run.node("mixtures", "bam")
    os.kill(run.done("mixtures", "bam")[-1][1], signal.SIGKILL)
    assert run.join() == "finished"
    assert len(run.done("mixtures", "bam")) == 60
    assert run.controller.attempts(find_task(run.tasks, "mixtures", "bam").id) == 2


def test_the_error_of_one_rank_is_that_of_the_group(cluster: Cluster, upcycled: Recipe) -> None:
    run = BackgroundRun(upcycled, ["mixtures"], StageFunctions(stub_stage, failing_rank_one))
    assert run.join() == "failed"
    assert run.state("mixtures", "bam").error == "experts do not fit"
    assert run.controller.attempts(find_task(run.tasks, "mixtures", "bam").id) == 1


@pytest.fixture
def project(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a job and a recipe, and set RAY_ADDRESS to the dashboard of the cluster."""
    write_project(tmp_path, "store")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", f"http://{cluster.webui_url}")
    return tmp_path


def test_a_job_is_stopped_and_submitted_again(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = FolderStore(project / "store")
    job = submit("recipe.yaml", [])

    def interrupt_when_running() -> None:
        wait_for(lambda: store.exists("steps/branches-law.json"), lambda: "no step yet")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_when_running).start()
    assert follow(job, store) == INTERRUPTED
    output = capsys.readouterr().out
    assert "seeds/seed committed" in output
    assert "tiny: interrupted, 2 of 5 committed" in output
    assert f"{job} was stopped: submit it again to resume" in output
    reached = json.loads(store.get("steps/branches-law.json"))
    assert 0 < len(reached) < 40

    assert follow(submit("recipe.yaml", []), store) == 0
    assert "tiny: finished, 5 of 5 committed" in capsys.readouterr().out
    assert json.loads(store.get("steps/branches-law.json"))[: len(reached)] == reached
    assert len(json.loads(store.get("steps/branches-law.json"))) == 40


def test_a_job_that_cannot_start_shows_its_error(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "store").write_text("in the way")
    store = FolderStore(project / "elsewhere")
    assert follow(submit("recipe.yaml", []), store) == 1
    assert f"error: folder store {project}/store: Not a directory" in capsys.readouterr().out


def test_errors_are_raised_before_a_job_is_submitted(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match="unknown key"):
        submit("recipe.yaml", ["mix.nothing=1"])
    outside = tmp_path_factory.mktemp("outside") / "recipe.yaml"
    outside.write_text((project / "recipe.yaml").read_text())
    with pytest.raises(SettingsError, match="is not below"):
        submit(outside, [])
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(PlacementError, match=r"no Ray cluster answers at http://127.0.0.1:9"):
        submit("recipe.yaml", [])
