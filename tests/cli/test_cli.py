"""Commands that work on recipes and runs, without a cluster. A user error is one line, with exit code 1."""

import socket
from pathlib import Path

import pytest

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.control import status
from bam_ray.control.controller import Controller
from bam_ray.control.launcher import InProcessLauncher
from tests.support.command_line import bam, refusal

DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("branch.tokens=5", "branch.tokens: unknown key"),
        ("mix.training.tokens=many", "mix.training.tokens: Input should be a valid integer"),
        ("branch.domains=[code,poetry]", "branch.domains names ['poetry']"),
        (
            "upcycle.mixtures.bam.method=average",
            "upcycle.mixtures.bam: method is 'average': use one of 'bam', 'btx', 'sparse', 'split', 'soup'",
        ),
        ("mix.expert_parallel=3", "does not divide the 4 experts"),
        ("serve.mixture=none", "serve.mixture is 'none'"),
        ("serve.replicas=many", "serve.replicas.number: Input should be a valid integer"),
        (
            "serve.replicas={min: 3, max: 2}",
            "serve.replicas.range: min is 3, which is more than max (2)",
        ),
        ("tokens", "is malformed: use key.subkey=value"),
    ],
)
def test_an_invalid_setting_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert message in refusal(monkeypatch, capsys, "plan", str(DEMO), override)


def test_a_missing_recipe_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "recipe nowhere.yaml cannot be read" in refusal(monkeypatch, capsys, "plan", "nowhere.yaml")


def test_a_run_without_a_cluster_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(DEMO.parents[1])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "RAY_ADDRESS" in refusal(monkeypatch, capsys, "run", str(DEMO))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{port}")
    assert "no Ray cluster answers" in refusal(monkeypatch, capsys, "run", str(DEMO))


def test_a_store_without_a_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "has no run" in refusal(monkeypatch, capsys, "status", str(tmp_path))
    assert "has no report yet" in refusal(monkeypatch, capsys, "report", str(tmp_path))


def test_plan_lists_every_task(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert bam(monkeypatch, "plan", str(DEMO)) == 0
    out = capsys.readouterr().out
    for kind in ("corpora", "seeds", "branches", "upcycled", "mixtures", "reports"):
        assert kind in out


def test_plan_simulates_a_cluster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    laptop = DEMO.parent / "clusters" / "laptop.yaml"
    assert bam(monkeypatch, "plan", str(DEMO), "--cluster", str(laptop)) == 0
    assert "simulated on laptop (1 node): finished after" in capsys.readouterr().out
    missing = refusal(monkeypatch, capsys, "plan", str(DEMO), "--cluster", "nowhere.yaml")
    assert "cluster file nowhere.yaml cannot be read" in missing
    assert "no node can satisfy branches/" in refusal(
        monkeypatch, capsys, "plan", str(DEMO), "branch.needs.gpus=1", "--cluster", str(laptop)
    )


def test_a_plan_that_fails_in_simulation_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    group = "{count: 4, tokens_per_second: 6000, preemptions_per_hour: 600}"
    (tmp_path / "fickle.yaml").write_text(f"name: fickle\nnodes: {{spot: {group}}}\n")
    assert bam(monkeypatch, "plan", str(DEMO), "--cluster", str(tmp_path / "fickle.yaml")) == 1
    captured = capsys.readouterr()
    assert "corpora" in captured.out and "simulated on fickle" in captured.out
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: the simulated run fails after ") and "was preempted" in line


def test_status_shows_the_stored_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = FolderStore(str(tmp_path))
    status.write(store, status.build("demo", Controller([], store, InProcessLauncher(lambda task, context: None))))
    Artifact(store, "seeds", "seed-1").commit(Manifest(id="seed-1", kind="seeds", name="seed"))
    assert bam(monkeypatch, "status", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "demo: finished, 0 of 0 committed" in out
    size = store.size("seeds/seed-1/manifest.json")
    assert f"stored: seeds {size}B; {size}B in total" in out


def test_serve_submits_the_job_that_rolls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from bam_ray.on_ray import submit

    submitted: list[str] = []

    def record(recipe: Path, overrides: list[str], entry: str, take_over: bool) -> str:
        submitted.append(entry)
        return "job"

    monkeypatch.setattr(submit, "submit", record)
    monkeypatch.setattr(submit, "follow", lambda job_id, store: 0)
    for options in ([], ["--rollback"]):
        assert bam(monkeypatch, "serve", str(DEMO), *options) == 0
    assert submitted == ["jobs/serve.py", "jobs/rollback.py"]
