"""The stage that trains adapters: its results do not depend on the task, on the attempt, or on killed workers."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from bam_ray.adapters.bundles import AdapterIndex
from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.manifest import MANIFEST, ArtifactKind
from bam_ray.errors import Interrupted
from bam_ray.pipeline.graph import task_graph
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import Recipe
from tests.support.adapter_run import ADAPTERS, TOPICS, adapter_recipe, make_parents
from tests.support.stage_run import RecordingContext, make_artifacts, run_task, small_recipe

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6  # of each topic


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def whole(tmp_path: Path) -> Recipe:
    """Return a recipe with one task of adapters, whose parents are made."""
    recipe = adapter_recipe(tmp_path, tasks=1)
    make_parents(recipe, open_store(recipe.store.uri), tmp_path / "topics")
    return recipe


def digests(recipe: Recipe) -> dict[str, str]:
    """Return the digest of each adapter that the run has, after reading all of them."""
    run = PipelineRun.of(recipe, open_store(recipe.store.uri))
    found: dict[str, str] = {}
    for task in run.tasks:
        if task.kind == ArtifactKind.ADAPTERS:
            index = AdapterIndex(run.artifact(task.kind, task.name))
            assert not found.keys() & set(index.names), "each topic is trained once"
            found |= {name: index.entry(name).sha256 for name in index.names if index.read(name)}
    return found


def saved(recipe: Recipe, store: BlobStore, task: str) -> list[str]:
    """Return the keys of the manifests of all saved adapters of a task that is not finished."""
    prefix = PipelineRun.of(recipe, store).artifact(ArtifactKind.ADAPTERS, task).prefix
    return [key for key in store.list(f"{prefix}/steps/") if key.endswith(MANIFEST)]


def test_an_adapter_is_the_same_in_every_task(whole: Recipe, tmp_path: Path) -> None:
    store = open_store(whole.store.uri)
    manifest = run_task(whole, store, ArtifactKind.ADAPTERS, "part-00")
    assert (manifest.step, manifest.tokens) == (TOPICS * STEPS, TOPICS * STEPS * 128)
    alone = digests(whole)
    assert len(set(alone.values())) == TOPICS, "topics have different text"

    divided = adapter_recipe(tmp_path, tasks=2)
    for task in ("part-01", "part-00"):
        run_task(divided, store, ArtifactKind.ADAPTERS, task)
    assert digests(divided) == alone
    assert saved(divided, store, "part-00") == [], "the saved adapters are deleted at the end"


def test_a_stopped_task_continues_with_the_next_topic(whole: Recipe, tmp_path: Path) -> None:
    store = open_store(whole.store.uri)
    context = RecordingContext(stop_at=2 * STEPS + 3)
    with pytest.raises(Interrupted, match="stopped with 2 of 5 adapters"):
        run_task(whole, store, ArtifactKind.ADAPTERS, "part-00", context)
    assert context.reports[-1].checkpoint_step == 2 * STEPS
    kept, damaged = saved(whole, store, "part-00")

    store.put(f"{damaged.removesuffix(MANIFEST)}adapter.safetensors", b"damaged")
    resumed = RecordingContext()
    run_task(whole, store, ArtifactKind.ADAPTERS, "part-00", resumed)
    assert kept.endswith(f"0001.0001-00000000/{MANIFEST}")
    assert resumed.reports[0].step == STEPS + 1, "the first topic is not trained again"

    (tmp_path / "undisturbed").mkdir()
    undisturbed = adapter_recipe(tmp_path / "undisturbed", tasks=1)
    other = open_store(undisturbed.store.uri)
    make_parents(undisturbed, other, tmp_path / "other")
    run_task(undisturbed, other, ArtifactKind.ADAPTERS, "part-00")
    assert digests(whole) == digests(undisturbed)


@pytest.mark.slow
def test_a_killed_worker_loses_only_its_topic(whole: Recipe, tmp_path: Path) -> None:
    store = open_store(whole.store.uri)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(whole.model_dump_json())
    for kill_at, finished in ((STEPS + 2, 1), (3 * STEPS + 5, 3)):
        command = [sys.executable, "-m", "tests.support.adapter_worker", str(recipe), "part-00", str(kill_at)]
        killed = subprocess.run(command, cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert len(saved(whole, store, "part-00")) == finished, "each topic is saved once"
    context = RecordingContext()
    manifest = run_task(whole, store, ArtifactKind.ADAPTERS, "part-00", context)
    assert manifest.attempt == "0001.0003"
    assert context.reports[0].step == 3 * STEPS + 1

    divided = adapter_recipe(tmp_path, tasks=5)  # an undisturbed run, whose tasks have other ids
    for number in range(5):
        run_task(divided, store, ArtifactKind.ADAPTERS, f"part-{number:02d}")
    assert digests(whole) == digests(divided)


def test_adapters_are_trained_for_topics_that_were_found(tmp_path: Path) -> None:
    topics = {"count": 4, "embedder": "tfidf", "min_documents": 3}
    recipe = small_recipe(tmp_path, topics=topics, adapters={**ADAPTERS, "tasks": 4})
    store = open_store(recipe.store.uri)
    make_artifacts(recipe, store, ("corpora", "seeds", "topics", "adapters"))
    run = PipelineRun.of(recipe, store)
    found = run.artifact(ArtifactKind.TOPICS, "topics").manifest()
    assert found is not None
    count = found.metrics["topics/count"]
    assert sorted(digests(recipe)) == [f"topic-{number:04d}" for number in range(int(count))]


def test_ids_depend_on_what_is_trained(tmp_path: Path) -> None:
    plain = {task.full_name: task.id for task in task_graph(small_recipe(tmp_path))}
    first = {task.full_name: task.id for task in task_graph(adapter_recipe(tmp_path))}
    assert plain.items() <= first.items(), "adapters change no other task"
    assert first.keys() - plain.keys() == {
        "topics/topics",
        "adapters/part-00",
        "adapters/part-01",
        "evaluations/adapters",
    }

    def changed(**adapters: object) -> set[str]:
        other = {task.full_name: task.id for task in task_graph(adapter_recipe(tmp_path, **adapters))}
        return {name for name, id in first.items() if other.get(name) != id}

    parts = {"adapters/part-00", "adapters/part-01", "evaluations/adapters"}
    assert changed(rank=8) == changed(targets=["q_proj"]) == changed(tasks=3) == parts
    assert changed(needs={"cpus": 2}) == changed(max_attempts=9) == set()


def test_tasks_know_their_steps_if_topics_are_counted(tmp_path: Path) -> None:
    tasks = [task for task in task_graph(adapter_recipe(tmp_path)) if task.kind == ArtifactKind.ADAPTERS]
    assert [task.total_steps for task in tasks] == [3 * STEPS, 2 * STEPS]
    plain = json.loads(adapter_recipe(tmp_path).model_dump_json())
    automatic = Recipe.model_validate({**plain, "topics": {"count": "auto"}})
    assert [task.total_steps for task in task_graph(automatic) if task.kind == ArtifactKind.ADAPTERS] == [0, 0]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"tasks": 6}, "adapters.tasks is 6, more than topics.count 5"),
        ({"training": {"tokens": 100, "batch_tokens": 100, "peak_lr": 0.1}}, "adapters.training.batch_tokens is 100"),
        (
            {"training": {"tokens": 9999, "batch_tokens": 128, "peak_lr": 0.1, "on_not_finite": "skip"}},
            "adapters.training can neither skip batches nor roll back",
        ),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, adapters: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        adapter_recipe(tmp_path, **adapters)
