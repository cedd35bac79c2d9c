"""The evaluation of adapters: its numbers are those of a plain computation, and controls are not served."""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from bam_ray.adapters.bundles import AdapterIndex
from bam_ray.adapters.lora import LoraModel
from bam_ray.adapters.run_adapters import RunAdapters
from bam_ray.adapters.topics import Topics
from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.data import Corpus
from bam_ray.errors import Interrupted
from bam_ray.evaluation.adapter_results import (
    RESULTS,
    AdapterResults,
    ScoredDocuments,
    adapter_results,
    print_adapter_results,
)
from bam_ray.model.loading import load_folder
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import Recipe
from bam_ray.stages.adapter_work import adapter_work, exchanged
from bam_ray.stages.evaluate_adapters import held_out_documents
from tests.support.adapter_run import ADAPTERS, adapter_recipe
from tests.support.stage_run import RecordingContext, make_artifacts, run_task, small_recipe

KINDS = ("corpora", "seeds", "topics", "adapters")
FOUND = {"count": 3, "embedder": "tfidf", "min_documents": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Return a recipe with topics, adapters and both controls, which are made."""
    adapters = {**ADAPTERS, "controls": ["random", "all_text"], "held_out_tokens": 50}
    recipe = small_recipe(tmp_path, topics=FOUND, adapters=adapters)
    make_artifacts(recipe, open_store(recipe.store.uri), KINDS)
    return recipe


def plain_nll(run: PipelineRun, row: torch.Tensor, adapter: tuple[str, str] | None) -> float:
    """Return the NLL of the tokens [L] with an adapter of a task, as transformers computes it."""
    settings = run.recipe.adapters
    assert settings is not None
    model = load_folder(run.artifact(ArtifactKind.SEEDS, "seed").fetch(), torch.float32)
    lora = LoraModel(model, settings.rank, settings.alpha, settings.targets)
    if adapter is not None:
        task, name = adapter
        lora.load(AdapterIndex(run.artifact(ArtifactKind.ADAPTERS, task)).read(name))
    with torch.inference_mode():
        loss = model.eval()(input_ids=row[None], labels=row[None]).loss
    return float(loss) * (len(row) - 1)


def test_scores_are_those_of_a_plain_computation(recipe: Recipe) -> None:
    store = open_store(recipe.store.uri)
    manifest = run_task(recipe, store, ArtifactKind.EVALUATIONS, "adapters")
    run = PipelineRun.of(recipe, store)
    folder = run.artifact(ArtifactKind.EVALUATIONS, "adapters").fetch()
    results = AdapterResults.model_validate_json((folder / RESULTS).read_bytes())
    assert results.models == ("base", "own", "auto", "auto_short", "random", "all_text")
    assert manifest.metrics["perplexity/own"] == results.mean["own"].value

    corpus = Corpus(run.artifact(ArtifactKind.CORPORA, "corpus").fetch())
    topics_folder = run.artifact(ArtifactKind.TOPICS, "topics").fetch()
    documents = held_out_documents(corpus, topics_folder, 50, 64)
    assert all(50 <= topic.tokens < 50 + corpus.sequence_length for topic in results.topics)
    topic = results.topics[0]
    (mine,) = np.nonzero(documents.topics == 0)
    assert (topic.documents, topic.tokens) == (len(mine), documents.tokens[mine].sum())
    adapters = {
        "base": None,
        "own": ("part-00", "topic-0000"),
        "random": ("control-random-00", "control-random-0000"),
        "all_text": ("control-all-text", "control-all-text"),
    }
    for model, adapter in adapters.items():
        rows = [torch.from_numpy(documents.rows[each, : documents.tokens[each] + 1]) for each in mine]
        nll = sum(plain_nll(run, row, adapter) for row in rows)
        assert topic.perplexity[model].value == pytest.approx(np.exp(nll / topic.tokens), rel=1e-5)
    assert len({topic.perplexity[model].value for model in adapters}) == len(adapters), "all models differ"

    out = StringIO()
    print_adapter_results(results, Console(file=out, width=200))
    assert "topic-0000" in out.getvalue() and "all_text" in out.getvalue()


def test_controls_are_not_served(recipe: Recipe) -> None:
    run = PipelineRun.of(recipe, open_store(recipe.store.uri))
    names = Topics.load(run.artifact(ArtifactKind.TOPICS, "topics").fetch()).names
    assert list(RunAdapters(run).found) == sorted(names)


def test_a_stopped_evaluation_commits_nothing(recipe: Recipe) -> None:
    store = open_store(recipe.store.uri)
    with pytest.raises(Interrupted, match="not evaluated"):
        run_task(recipe, store, ArtifactKind.EVALUATIONS, "adapters", RecordingContext(stop_at=2))
    assert PipelineRun.of(recipe, store).artifact(ArtifactKind.EVALUATIONS, "adapters").manifest() is None


def test_controls_have_as_much_text_as_topics(recipe: Recipe) -> None:
    settings, run = recipe.adapters, PipelineRun.of(recipe, open_store(recipe.store.uri))
    assert settings is not None
    steps = {task.name: task.total_steps for task in run.tasks if task.kind == ArtifactKind.ADAPTERS}
    assert steps["control-random-00"] == steps["part-00"] == 2 * settings.training.steps
    assert steps["control-all-text"] == 3 * settings.training.steps
    gives_way = {task.name for task in run.tasks if task.kind == ArtifactKind.ADAPTERS and task.gives_way}
    assert gives_way == {"control-random-00", "control-random-01"}, "they lose one topic if they are moved"
    tokens = {
        name: run.artifact(ArtifactKind.ADAPTERS, name).manifest().tokens  # type: ignore[union-attr]
        for name in steps
    }
    found = len(Topics.load(run.artifact(ArtifactKind.TOPICS, "topics").fetch()))
    assert tokens["control-all-text"] == found * settings.training.steps * settings.training.batch_tokens
    assert tokens["control-all-text"] == tokens["part-00"] + tokens["part-01"]

    corpus = Corpus(run.artifact(ArtifactKind.CORPORA, "corpus").fetch())
    folder = run.artifact(ArtifactKind.TOPICS, "topics").fetch()
    names = [f"topic-{number:04d}" for number in range(found)]
    everything = adapter_work("control-all-text", settings, corpus, names, folder).rows.train("control-all-text")
    words = sum(corpus.train(domain).size for domain in corpus.domains)
    assert words <= everything.size < words + corpus.sequence_length


def test_exchanged_documents_keep_the_sizes_of_topics() -> None:
    assigned = {"a": np.repeat([0, 1], 50).astype(np.int32), "b": np.full(100, 2, np.int32)}
    first, second, same = exchanged(assigned, 0), exchanged(assigned, 1), exchanged(assigned, 0)
    for each in (first, second):
        assert [len(each["a"]), len(each["b"])] == [100, 100]
        assert np.bincount(np.concatenate([each["a"], each["b"]])).tolist() == [50, 50, 100]
    assert np.array_equal(first["b"], same["b"]) and not np.array_equal(first["b"], second["b"])


def test_controls_change_no_adapter(tmp_path: Path) -> None:
    plain = {
        task.full_name: task.id for task in PipelineRun.of(adapter_recipe(tmp_path), open_store("memory://")).tasks
    }
    controls = adapter_recipe(tmp_path, controls=["random", "all_text"])
    more = {task.full_name: task.id for task in PipelineRun.of(controls, open_store("memory://")).tasks}
    added = {"adapters/control-random-00", "adapters/control-random-01", "adapters/control-all-text"}
    assert more.keys() - plain.keys() == added
    assert {name for name in plain if more[name] != plain[name]} == {"evaluations/adapters"}


def test_means_weight_documents_by_their_tokens() -> None:
    nll = {"base": np.array([10.0, 40.0, 30.0]), "own": np.array([5.0, 20.0, 30.0])}
    scored = ScoredDocuments(
        topics=np.array([0, 0, 1]),
        tokens=np.array([10, 20, 10]),
        nll=nll,
        chosen={"auto": np.array([0, -1, 0])},
    )
    results = adapter_results("run", {}, [("x", ()), ("y", ()), ("empty", ())], scored)
    assert results.mean["base"].value == pytest.approx(np.exp(80 / 40))
    assert results.ratios["base"].value == pytest.approx(np.exp(-25 / 40))
    assert [topic.name for topic in results.topics] == ["x", "y"]
    assert results.topics[0].perplexity["own"].value == pytest.approx(np.exp(25 / 30))
    assert results.routing["auto"] == pytest.approx(1 / 3) and results.far["auto"] == pytest.approx(1 / 3)
    low, high = results.mean["base"].interval
    assert low < results.mean["base"].value < high
