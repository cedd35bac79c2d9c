"""Discovered domains in all stages: they are branched, upcycled, mixed and evaluated like named ones."""

import io
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from bam_ray.adapters.topics import Topics
from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control import status
from bam_ray.control.controller import Controller
from bam_ray.control.launcher import InProcessLauncher
from bam_ray.errors import Interrupted
from bam_ray.on_ray.run_summary import show_results
from bam_ray.pipeline.graph import task_graph
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import Recipe
from bam_ray.terminal import terminal_console
from tests.support.command_line import bam
from tests.support.stage_run import TRAINING, RecordingContext, make_artifacts, run_task, small_recipe, task_run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


def discover_recipe(folder: Path) -> Recipe:
    """Return a recipe with the two texts of `small_recipe` as sources without labels."""
    sources = {name: {"source": str(folder / f"{name}.jsonl")} for name in ("general", "code")}
    return small_recipe(
        folder,
        data={
            "discover": {"domains": 2, "sources": sources},
            "sequence_length": 32,
            "held_out_fraction": 0.3,
            "tokenizer": {"vocab_size": 300},
        },
        branch={"training": TRAINING},
        mix={"training": TRAINING, "expert_parallel": 1},
    )


def test_discovered_domains_go_through_all_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = discover_recipe(tmp_path)
    store = open_store(recipe.store.uri)
    context = RecordingContext()
    corpus = run_task(recipe, store, ArtifactKind.CORPORA, "corpus", context)
    assert corpus.facts["discovered"]["adjusted_mutual_information"] == 1.0
    last = context.reports[-1]
    assert (last.step, last.note) == (last.total_steps, "uploading")
    assert [report.step for report in context.reports] == sorted(report.step for report in context.reports)
    folder = task_run(recipe, store, ArtifactKind.CORPORA, "corpus").artifact.fetch()
    assert Topics.load(folder / "discovered").names == ("domain-0", "domain-1")

    make_artifacts(recipe, store, ("seeds", "branches", "upcycled", "mixtures", "reports"))
    run = PipelineRun.of(recipe, store)
    config = AutoModelForCausalLM.from_pretrained(run.artifact(ArtifactKind.MIXTURES, "bam").fetch()).config
    assert config.expert_names == ["seed", "domain-0", "domain-1"]
    report = run.artifact(ArtifactKind.REPORTS, "report").fetch()
    models = json.loads((report / "results.json").read_text())["models"]
    assert {"domain-0", "domain-1", "bam"} <= {model["name"] for model in models}
    assert list(models[0]["domains"]) == ["general", "domain-0", "domain-1"]
    perplexities = {model["name"]: model["domains"]["domain-0"]["nll"] for model in models}
    assert perplexities["domain-0"] < perplexities["domain-1"], "each branch is a specialist of its domain"

    terms = corpus.facts["domains"]["domain-0"]["terms"]
    assert len(terms) > 5 and ", ".join(terms) in (report / "report.html").read_text()
    line = f"domain-0: {', '.join(terms[:5])} ({next(iter(corpus.facts['domains']['domain-0']['source']))} 100%)"
    out = io.StringIO()
    show_results(run, terminal_console(file=out, width=200))
    assert line in out.getvalue()
    controller = Controller(task_graph(recipe), store, InProcessLauncher(lambda task, context: None))
    status.write(store, status.build("small", controller))
    capsys.readouterr()
    assert bam(monkeypatch, "status", recipe.store.uri) == 0
    assert line in " ".join(capsys.readouterr().out.split())


def test_an_interrupted_search_is_started_again(tmp_path: Path) -> None:
    recipe = discover_recipe(tmp_path)
    store = open_store(recipe.store.uri)
    searching = RecordingContext(stop_at=2)  # after the two sources
    with pytest.raises(Interrupted, match="run the same command again"):
        run_task(recipe, store, ArtifactKind.CORPORA, "corpus", searching)
    assert searching.reports[-1].note == "discovering domains"
    assert run_task(recipe, store, ArtifactKind.CORPORA, "corpus").facts["domains"].keys() == set(recipe.data.names)
