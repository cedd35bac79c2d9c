"""The artifacts that a recipe serves, and the kinds that must be made before."""

import sys
from pathlib import Path

import pytest

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.control.endpoint_record import EndpointRecord
from bam_ray.errors import CheckpointError, SettingsError, StoreBusy
from bam_ray.on_ray import job, serve_app
from bam_ray.on_ray.follow import new_models
from bam_ray.on_ray.serve_app import ApplicationArguments, application, served_kinds, served_models
from bam_ray.pipeline.graph import subset
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import load_recipe
from tests.support.failing_store import FailingStore

RECIPE = Path(__file__).parents[2] / "recipes" / "demo.yaml"
POSTERIOR = ["serve.mode=posterior", "serve.mixture=null"]


@pytest.fixture
def run(tmp_path: Path) -> PipelineRun:
    """Return a run that serves the posterior ensemble, over an empty store."""
    return PipelineRun.of(load_recipe(RECIPE, POSTERIOR), FolderStore(tmp_path / "store"))


def commit(run: PipelineRun, kind: ArtifactKind, name: str, folder: Path) -> Artifact:
    """Commit an artifact with one file."""
    artifact = run.artifact(kind, name)
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    artifact.publish(folder, Manifest(id=artifact.id, kind=kind, name=name))
    return artifact


def test_members_are_the_seed_and_the_whole_branches(run: PipelineRun, tmp_path: Path) -> None:
    first, second, third, _ = run.recipe.branch.domains
    with pytest.raises(CheckpointError, match=r"no branch of .* is committed: run the stage that makes them"):
        served_models(run)
    seed = commit(run, ArtifactKind.SEEDS, "seed", tmp_path / "folder")
    branches = [commit(run, ArtifactKind.BRANCHES, name, tmp_path / "folder") for name in (first, second, third)]

    def members() -> list[str]:
        models, name = served_models(run)
        assert name == "posterior"
        return [model.id for model in models]

    assert members() == [seed.id, *(branch.id for branch in branches)]
    manifest = branches[0].manifest()
    assert manifest is not None
    branches[0].set_aside(manifest, "damaged")
    assert members() == [seed.id, branches[1].id, branches[2].id]
    manifest = branches[1].manifest()
    assert manifest is not None
    run.store.delete(branches[1].key(manifest, "model.safetensors"))
    assert members() == [seed.id, branches[2].id]


def test_a_busy_store_is_asked_for_members_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FailingStore()
    run = PipelineRun.of(load_recipe(RECIPE, POSTERIOR), store)
    branch = commit(run, ArtifactKind.BRANCHES, run.recipe.branch.domains[0], tmp_path / "folder")

    def warn(line: str) -> None:
        store.failure = None

    monkeypatch.setattr(serve_app, "warn", warn)
    store.failure = StoreBusy("SlowDown")
    models, _ = served_models(run)
    assert [model.id for model in models[1:]] == [branch.id]
    store.failure = StoreBusy("SlowDown")
    monkeypatch.setattr(serve_app, "open_store", lambda *arguments: store)
    with pytest.raises(CheckpointError, match=r"mixtures/.* is not committed"):
        application(ApplicationArguments(recipe=str(RECIPE), overrides=["serve.open=true"]))


def test_a_withdrawn_branch_changes_no_other_branch(run: PipelineRun) -> None:
    kept = run.recipe.branch.domains[1:]
    fewer = PipelineRun.of(
        load_recipe(RECIPE, [*POSTERIOR, f"branch.domains={kept}", "mix.expert_parallel=1"]), run.store
    )
    for name in kept:
        assert fewer.artifact(ArtifactKind.BRANCHES, name).id == run.artifact(ArtifactKind.BRANCHES, name).id


def test_nothing_is_upcycled_or_mixed(run: PipelineRun) -> None:
    kinds = {task.kind for task in subset(run.tasks, served_kinds(run.recipe))}
    assert kinds == {ArtifactKind.CORPORA, ArtifactKind.SEEDS, ArtifactKind.BRANCHES}
    assert served_kinds(load_recipe(RECIPE)) == [ArtifactKind.MIXTURES]


def test_a_job_makes_what_its_recipe_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def run_tasks(recipe: object, kinds: object, factory: object, take_over: bool) -> str:
        made.append(kinds)
        return "finished"

    monkeypatch.setattr(job, "run_tasks", run_tasks)
    for overrides in ([], POSTERIOR):
        monkeypatch.setattr(sys, "argv", ["serve.py", "--recipe", str(RECIPE), *overrides])
        with pytest.raises(SystemExit, match="0"):
            job.run_job(served_kinds)
    assert made == [[ArtifactKind.MIXTURES], [ArtifactKind.BRANCHES]]


def test_a_seed_that_is_missing_is_refused(run: PipelineRun, tmp_path: Path) -> None:
    commit(run, ArtifactKind.BRANCHES, run.recipe.branch.domains[0], tmp_path / "folder")
    arguments = ApplicationArguments(
        recipe=str(RECIPE), overrides=[*POSTERIOR, "serve.open=true", f"store.uri={run.store.uri}"]
    )
    with pytest.raises(CheckpointError, match=r"seeds/seed-.* is not committed"):
        application(arguments)


def test_a_branch_makes_a_new_ensemble(run: PipelineRun, tmp_path: Path) -> None:
    first, second, *_ = run.recipe.branch.domains
    seed = commit(run, ArtifactKind.SEEDS, "seed", tmp_path / "folder")
    commit(run, ArtifactKind.BRANCHES, first, tmp_path / "folder")
    models, name = served_models(run)
    record = EndpointRecord(name=name, served=tuple(model.prefix for model in models))
    assert [[each.prefix for each in new] for new in new_models(run, record)] == [list(record.served)]
    record = record.see([record.served])
    assert new_models(run, record) == []
    commit(run, ArtifactKind.BRANCHES, second, tmp_path / "folder")
    (new,) = new_models(run, record)
    assert [model.id for model in new] == [
        seed.id,
        *(run.artifact(ArtifactKind.BRANCHES, name).id for name in (first, second)),
    ]


def test_a_configuration_file_cannot_follow() -> None:
    with pytest.raises(SettingsError, match=r"add the override serve\.follow=false"):
        application(ApplicationArguments(recipe=str(RECIPE), overrides=["serve.open=true", "serve.follow=true"]))


def test_a_recipe_without_branches_is_refused() -> None:
    without = ["branch.domains=[]", "upcycle.mixtures={sparse: {method: sparse, num_experts: 4}}"]
    with pytest.raises(SettingsError, match=r"branch\.domains is empty: add a domain, or set serve\.mode to mixture"):
        load_recipe(RECIPE, [*POSTERIOR, *without])
    load_recipe(RECIPE, ["serve.mixture=sparse", *without])  # the recipe is right otherwise


def test_adapters_are_served_on_the_seed(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, ["serve.mode=adapters", "serve.adapters={source: /adapters}", "serve.mixture=null"])
    assert served_kinds(recipe) == [ArtifactKind.SEEDS]
    models, name = served_models(PipelineRun.of(recipe, FolderStore(tmp_path)))
    assert ([model.kind for model in models], name) == ([ArtifactKind.SEEDS], "seed")
    for overrides in (["serve.mode=adapters"], ["serve.adapters={source: /adapters}"]):
        with pytest.raises(SettingsError, match="need each other: set both"):
            load_recipe(RECIPE, [*overrides, "serve.mixture=null"])
