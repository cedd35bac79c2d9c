"""The job of `bam compare` in one process: a run for each training seed, and the comparison of their reports."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus
from rich.console import Console

from bam_ray.blobs import open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.control import status
from bam_ray.control.controller import Controller, RunOutcome
from bam_ray.control.launcher import InProcessLauncher, PlacedTask
from bam_ray.errors import StoreBusy, TrainingError
from bam_ray.on_ray import job, submit
from bam_ray.on_ray.comparison import compare_seeds
from bam_ray.on_ray.submit import END_OF_RUN
from bam_ray.pipeline.graph import task_graph
from bam_ray.pipeline.tasks import StageContext
from bam_ray.settings import Recipe
from bam_ray.stages.compare import compare_reports, read_comparison
from bam_ray.terminal import terminal_console
from tests.support.command_line import bam
from tests.support.stage_run import run_task, small_recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


def console() -> Console:
    return terminal_console(file=io.StringIO(), width=200)


def output(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


def made_here(recipe: Recipe) -> RunOutcome:
    """Make all artifacts of a recipe that are missing, with the controller of a run and threads of this process."""
    store = open_store(recipe.store.uri)

    def work(placed: PlacedTask, context: StageContext) -> None:
        run_task(recipe, store, placed.task.kind, placed.task.name, context)

    return Controller(task_graph(recipe), store, InProcessLauncher(work)).run(pause=0.01)


def ids(recipe: Recipe, kind: ArtifactKind) -> set[str]:
    return {key.split("/")[1] for key in open_store(recipe.store.uri).list(f"{kind}/")}


def test_two_seeds_are_made_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(tmp_path, compare={"seeds": [0, 4], "dense": [0.5, 1]})
    store = open_store(recipe.store.uri)
    shown = console()
    assert compare_seeds(recipe, made_here, shown) == "finished"
    counts = {kind: len(ids(recipe, kind)) for kind in ArtifactKind}
    assert counts["corpora"] == counts["comparisons"] == 1, "all training seeds share the corpus"
    assert counts["seeds"] == counts["branches"] == counts["reports"] == 2
    assert counts["controls"] == counts["mixtures"] == 4

    (id,) = ids(recipe, ArtifactKind.COMPARISONS)
    artifact = Artifact(store, ArtifactKind.COMPARISONS, id)
    manifest, comparison = artifact.manifest(), read_comparison(artifact)
    assert manifest is not None
    assert set(manifest.files) == {"comparison.json", "index.html"}
    assert set(manifest.parents) == ids(recipe, ArtifactKind.REPORTS) == set(comparison.reports)
    assert comparison.training_seeds == (0, 4)
    dense = next(model for model in comparison.models if model.label == "dense")
    assert dense.trained[0].perplexity != dense.trained[1].perplexity
    text = output(shown)
    assert "training seed 4 (2 of 2)" in text.partition(END_OF_RUN)[0]
    end = text.partition(END_OF_RUN)[2]
    assert all(line in end for line in comparison.statements) and "mixture btx: " in end
    assert f"comparison: {artifact.uri}/index.html (`bam report {store.uri}` downloads it)" in end

    keys = set(store.list())
    assert compare_seeds(recipe, made_here, console()) == "finished"
    assert set(store.list()) == keys, "everything is used again"

    soup = {**recipe.upcycle.model_dump()["mixtures"], "soup": {"method": "soup"}}
    more = recipe.model_copy(update={"upcycle": recipe.upcycle.model_validate({"mixtures": soup})})
    assert compare_seeds(more, made_here, console()) == "finished"
    again = {kind: len(ids(recipe, kind)) for kind in ArtifactKind}
    new = {"upcycled": 2, "mixtures": 2, "evaluations": 2, "reports": 2, "comparisons": 1}
    assert again == {kind: count + new.get(kind, 0) for kind, count in counts.items()}, "a row costs its own training"

    assert bam(monkeypatch, "report", str(store.uri), "--out", str(tmp_path / "out")) == 0
    assert "mixture soup: " in capsys.readouterr().out
    assert "mixture soup" in (tmp_path / "out" / "comparison" / "index.html").read_text()
    assert (tmp_path / "out" / "report.html").exists()


def test_a_failed_seed_is_named(tmp_path: Path) -> None:
    recipe, seen = small_recipe(tmp_path), []

    def fails_at_1(seeded: Recipe) -> RunOutcome:
        seen.append(seeded.mix.training.seed)
        return "failed" if seeded.mix.training.seed == 1 else "finished"

    shown = console()
    with pytest.raises(TrainingError, match=r"training seed 1 has failed.*1 of 3 training seeds are finished"):
        compare_seeds(recipe, fails_at_1, shown)
    assert seen == [0, 1], "the default seeds, up to the one that failed"
    assert END_OF_RUN in output(shown), "so that `bam compare` shows the error"
    assert not ids(recipe, ArtifactKind.COMPARISONS)


def test_a_stopped_comparison_ends_at_once(tmp_path: Path) -> None:
    seen = []

    def stopped(seeded: Recipe) -> RunOutcome:
        seen.append(seeded)
        return "interrupted"

    assert compare_seeds(small_recipe(tmp_path), stopped, console()) == "interrupted"
    assert len(seen) == 1
    assert seen[0].compare is not None, "there is always a dense control"


def test_a_damaged_comparison_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(tmp_path, compare={"seeds": [3]}, upcycle={"mixtures": {"btx": {"method": "btx"}}})
    store = open_store(recipe.store.uri)
    compare_seeds(recipe, made_here, console())
    (id,) = ids(recipe, ArtifactKind.COMPARISONS)
    artifact = Artifact(store, ArtifactKind.COMPARISONS, id)
    first = artifact.manifest()
    assert isinstance(first, Manifest)
    store.put(artifact.key(first, "comparison.json"), b"{}")
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "another cache"))
    shown = console()
    compare_seeds(recipe, made_here, shown)
    assert "There is only one training seed." in output(shown)
    assert read_comparison(artifact).training_seeds == (3,)
    assert artifact.manifest() != first


def test_a_busy_store_is_asked_again_for_the_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(tmp_path, compare={"seeds": [3]}, upcycle={"mixtures": {"btx": {"method": "btx"}}})
    asked = []

    def busy_once(*arguments: Any) -> object:
        asked.append(arguments)
        if len(asked) == 1:
            raise StoreBusy("SlowDown")
        return compare_reports(*arguments)

    monkeypatch.setattr("bam_ray.stages.compare.compare_reports", busy_once)
    shown = console()
    assert compare_seeds(recipe, made_here, shown) == "finished"
    assert len(asked) == 2
    assert "There is only one training seed." in output(shown)


def test_the_job_makes_reports_and_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, object, bool]] = []

    def run_tasks(recipe: Recipe, kinds: object, factory: object, take_over: bool) -> str:
        seen.append((recipe.mix.training.seed, kinds, take_over))
        return "interrupted" if recipe.mix.training.seed == 6 else "finished"

    monkeypatch.setattr(job, "run_tasks", run_tasks)
    arguments = ["recipes/demo.yaml", "--take-over", f"store.uri={tmp_path}", "compare.seeds=[5, 6, 7]"]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--recipe", *arguments])
    with pytest.raises(SystemExit, match="130"):
        job.compare_job()
    assert seen == [(5, ["reports"], True), (6, ["reports"], True)]


class TwoRuns:
    """A job server whose job has finished one run, and finishes the second one after a few polls."""

    def __init__(self) -> None:
        self.polls = 0

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        self.polls += 1
        ended = JobStatus.SUCCEEDED if self.polls > 6 else JobStatus.RUNNING
        return SimpleNamespace(status=ended, start_time=0, message="", driver_exit_code=0)

    def get_job_logs(self, job_id: str) -> str:
        return "training seed 1\n" + (f"{END_OF_RUN}\nthe comparison\n" if self.polls > 3 else "")


def test_a_job_of_several_runs_is_followed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path))
    status.write(store, status.build("demo", Controller([], store, InProcessLauncher(lambda task, context: None))))
    server = TwoRuns()
    monkeypatch.setattr(submit, "client", lambda address: server)
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.0)
    shown_at = []
    monkeypatch.setattr(submit.LineOutput, "update", lambda output, now: shown_at.append(server.polls))
    assert submit.follow("raysubmit_1", store) == 0
    assert shown_at == [1, 2, 3, 4], "the table is shown until the last run has ended"
    assert capsys.readouterr().out == "the comparison\n"
