"""The end of a run prints held-out text and names of files as they are."""

import io
from pathlib import Path

import pytest

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.data import build_corpus
from bam_ray.errors import StoreBusy
from bam_ray.evaluation.findings import make_results
from bam_ray.on_ray import run_summary
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import DataSettings
from bam_ray.terminal import terminal_console
from tests.support.failing_store import FailingStore
from tests.support.paper_table import PAPER, model_score
from tests.support.stage_run import small_recipe

SKIPPED = "domain code: 1 of 2 files of [/data] are skipped: 'a.pdf' (unknown format)"


def pipeline_run(folder: Path) -> PipelineRun:
    recipe = small_recipe(folder)
    return PipelineRun.of(recipe, open_store(recipe.store.uri))


def publish(run: PipelineRun, kind: ArtifactKind, name: str, folder: Path, **facts: object) -> None:
    artifact = run.artifact(kind, name)
    artifact.publish(folder, Manifest(id=artifact.id, kind=kind, name=name, facts=facts))


def test_the_results_name_skipped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    run = pipeline_run(tmp_path)
    results = make_results("[/paper]", [model_score(name, row) for name, row in PAPER.items()])
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.json").write_text(results.model_dump_json())
    publish(run, ArtifactKind.REPORTS, "report", tmp_path / "report")
    publish(run, ArtifactKind.CORPORA, "corpus", tmp_path / "report", skipped=[SKIPPED])
    out = io.StringIO()
    run_summary.show_results(run, terminal_console(file=out, width=200))
    assert "Held-out perplexity of [/paper]" in out.getvalue()
    assert out.getvalue().endswith(f"{SKIPPED}\n")


def test_a_busy_store_is_asked_for_the_results_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    store = FailingStore()
    run = PipelineRun.of(small_recipe(tmp_path), store)
    results = make_results("paper", [model_score(name, row) for name, row in PAPER.items()])
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.json").write_text(results.model_dump_json())
    publish(run, ArtifactKind.REPORTS, "report", tmp_path / "report")
    lines: list[str] = []

    def warn(line: str) -> None:
        lines.append(line)
        store.failure = None

    monkeypatch.setattr(run_summary, "warn", warn)
    store.failure = StoreBusy("SlowDown")
    out = io.StringIO()
    run_summary.show_results(run, terminal_console(file=out, width=200))
    assert "Held-out perplexity of paper" in out.getvalue()
    assert [line.partition(":")[0] for line in lines] == ["SlowDown"]


def test_completions_are_printed_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    run = pipeline_run(tmp_path)
    texts = {domain: tmp_path / "texts" / domain for domain in ("general", "code")}
    for domain, folder in texts.items():
        folder.mkdir(parents=True)
        for number in range(4):
            words = " ".join(f"[/usr/{domain}{number * 40 + word}] \x1b[31m" for word in range(40))
            (folder / f"{number}.txt").write_text(words)
    settings = DataSettings.model_validate(
        {
            "domains": {domain: {"source": str(folder)} for domain, folder in texts.items()},
            "sequence_length": 32,
            "held_out_fraction": 0.3,
            "tokenizer": {"vocab_size": 300},
        }
    )
    (tmp_path / "corpus").mkdir()
    build_corpus(settings, tmp_path / "corpus", lambda text: None)
    publish(run, ArtifactKind.CORPORA, "corpus", tmp_path / "corpus")
    monkeypatch.setattr(run_summary, "complete", lambda *arguments: iter(["[/bin]", "\x1b[2J", "[bold]"]))
    out = io.StringIO()
    run_summary.stream_completions(run, "http://127.0.0.1:1", "bam", terminal_console(file=out, width=300))
    assert out.getvalue().count("[/bin][2J[bold]") == 2
    assert "code [/usr/code" in out.getvalue()
    assert "\x1b" not in out.getvalue()
