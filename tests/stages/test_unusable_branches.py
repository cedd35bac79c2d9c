"""A late branch that is damaged or does not fit is left out, and the mixture and the run finish without it."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.errors import StoreUnavailable
from bam_ray.evaluation.results import Results
from tests.support.late_branch_run import ControlledRun, LateBranchRun, expert_names
from tests.support.stage_run import (
    TRAINING,
    RecordingContext,
    run_task,
    small_recipe,
)
from tests.support.stored_files import stored_file

FFN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


def three_domains(folder: Path) -> dict[str, Any]:
    """Return the settings `data` with a third domain, `math`."""
    words = random.Random("math")
    texts = [" ".join("".join(words.choices("012345", k=4)) for _ in range(60)) for _ in range(40)]
    (folder / "math.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = small_recipe(folder).data.model_dump()
    return {**data, "domains": {**data["domains"], "math": {"source": str(folder / "math.jsonl")}}}


def damage(weights: Path) -> None:
    """Change the last byte of a file."""
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")


def publish_changed(run: LateBranchRun, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Commit the other branch's weights, changed by `change`, as the late branch; the digests are correct."""
    shutil.copytree(Artifact(run.store, "branches", run.task(ArtifactKind.BRANCHES, "code").id).fetch(), folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    id = run.task(ArtifactKind.BRANCHES, "general").id
    Artifact(run.store, "branches", id).publish(folder, Manifest(id=id, kind="branches", name="general"))


def check_that_it_is_left_out(run: LateBranchRun, words: str) -> None:
    """Check that the next attempt leaves the branch out with an error that contains `words`, and trains to the end."""
    context = RecordingContext()
    manifest = run_task(run.recipe, run.store, "mixtures", "bam", context)
    assert manifest is not None
    left_out = [(event["step"], event["branch"]) for event in run.events("left_out")]
    assert left_out == [(4, "general")]
    error = run.events("left_out")[0]["error"]
    assert words in error and "\n" not in error
    assert context.reports[0].note == f"left out late branch general: {error}"
    assert {(progress.experts, progress.left_out) for progress in context.reports} == {(("seed", "code"), ("general",))}
    assert manifest.facts["left_out"] == ["general"]
    assert manifest.parents == run.mixture.parents
    assert expert_names(Artifact(run.store, "mixtures", manifest.id).fetch()) == ["seed", "code"]
    assert [event["step"] for event in run.events("resumed")] == [0, 4]
    assert run.events("absorbed") == run.events("failed") == []


@pytest.mark.parametrize(
    ("file", "damage_file", "words"),
    [
        ("model.safetensors", damage, "does not match its manifest"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1]), "does not match its manifest"),
        ("model.safetensors", Path.unlink, "is missing"),
        ("config.json", lambda path: path.write_bytes(b"{"), "does not match its manifest"),
        ("manifest.json", lambda path: path.write_bytes(b"{"), "is not a manifest"),
    ],
    ids=["changed", "cut-short", "missing", "config", "manifest"],
)
def test_a_damaged_late_branch_is_left_out(
    tmp_path: Path, file: str, damage_file: Callable[[Path], object], words: str
) -> None:
    run = LateBranchRun(tmp_path)
    run.start()
    run.mix(stop_at=4)
    late = run.branch("general")
    damage_file(stored_file(tmp_path / "store", f"branches/{late.id}", file))
    check_that_it_is_left_out(run, words)
    damaged = None if file == "manifest.json" else {"id": late.id, "generation": 0}
    assert run.events("left_out")[0]["damaged"] == damaged


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights[FFN][0].fill_(float("nan")), "not finite"),
        (lambda weights: weights.pop(FFN), "lacks model.layers.0.mlp.down_proj.weight"),
        (lambda weights: weights.update({FFN: weights[FFN][:-1].clone()}), "shape"),
    ],
    ids=["nan", "lacks", "shape"],
)
def test_a_late_branch_that_does_not_fit_is_left_out(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    run = LateBranchRun(tmp_path)
    run.start()
    run.mix(stop_at=4)
    publish_changed(run, tmp_path / "changed", change)
    check_that_it_is_left_out(run, words)


def test_a_damaged_late_branch_does_not_affect_another_one(tmp_path: Path) -> None:
    run = LateBranchRun(
        tmp_path, branch={"domains": ["code", "general", "math"], "training": TRAINING}, data=three_domains(tmp_path)
    )
    run.start()
    run.mix(stop_at=4)
    late = {name: run.branch(name) for name in ("general", "math")}
    damage(stored_file(tmp_path / "store", f"branches/{late['general'].id}", "model.safetensors"))
    manifest = run.mix()
    assert manifest is not None
    assert [event["branch"] for event in run.events("left_out")] == ["general"]
    assert [event["branch"] for event in run.events("absorbed")] == ["math"]
    assert expert_names(Artifact(run.store, "mixtures", manifest.id).fetch()) == ["seed", "code", "math"]
    assert manifest.facts["left_out"] == ["general"]
    assert manifest.parents == (*run.mixture.parents, late["math"].id)


def test_a_repaired_late_branch_is_absorbed_by_the_next_attempt(tmp_path: Path) -> None:
    run = LateBranchRun(tmp_path)
    run.start()
    run.mix(stop_at=4)
    weights = stored_file(tmp_path / "store", f"branches/{run.branch('general').id}", "model.safetensors")
    whole = weights.read_bytes()
    damage(weights)
    run.mix(stop_at=7)
    weights.write_bytes(whole)
    run.mix()
    assert [event["step"] for event in run.events("left_out")] == [4]
    assert [event["step"] for event in run.events("absorbed")] == [7]


def test_no_branch_is_left_out_because_the_store_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = LateBranchRun(tmp_path)
    run.start()
    run.mix(stop_at=4)
    run.branch("general")

    def unavailable(artifact: Artifact, manifest: Manifest) -> None:
        raise StoreUnavailable("the endpoint is down")

    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "check_files", unavailable)
        with pytest.raises(StoreUnavailable, match="down"):
            run_task(run.recipe, run.store, "mixtures", "bam")
    assert [event["attempt"] for event in run.events("started")] == ["0001.0001", "0001.0002"]
    assert [event["error"] for event in run.events("failed")] == ["StoreUnavailable: the endpoint is down"]
    manifest = run.mix()
    assert manifest is not None
    assert run.events("left_out") == []
    assert [event["step"] for event in run.events("absorbed")] == [4]


@pytest.mark.parametrize("too_late", [False, True], ids=["in-time", "too-late"])
def test_a_damaged_late_branch_is_made_again(tmp_path: Path, too_late: bool) -> None:
    run = LateBranchRun(tmp_path)
    branch = Artifact(run.store, "branches", run.task(ArtifactKind.BRANCHES, "general").id)

    def damage_branch() -> None:
        damage(stored_file(tmp_path / "store", branch.prefix, "model.safetensors"))

    # The branch is damaged before its stage returns, which is when the controller sees that it is committed
    causes = ControlledRun(run, damage_branch, too_late).causes
    assert causes == ["to absorb general", *([] if too_late else ["to absorb general"]), "committed"]
    left_out = run.events("left_out")
    assert [(event["step"], event["damaged"]) for event in left_out] == [(4, {"id": branch.id, "generation": 0})]
    made = branch.manifest()
    assert made is not None
    assert made.attempt == "0001.0002", "it was made again under a new lease"
    branch.check()
    assert run.store.exists(f"{branch.prefix}/manifest-0000.damaged.json")
    mixture = Artifact(run.store, "mixtures", run.mixture.id)
    manifest = mixture.manifest()
    assert manifest is not None
    assert [event["step"] for event in run.events("absorbed")] == ([] if too_late else [5])
    assert manifest.facts["left_out"] == (["general"] if too_late else [])
    assert expert_names(mixture.fetch()) == ["seed", "code", *([] if too_late else ["general"])]
    assert len(run.losses()) == 10
    assert run.events("failed") == []
    report = run.task(ArtifactKind.REPORTS, "report")
    results = Results.model_validate_json(Artifact(run.store, "reports", report.id).read_file("results.json"))
    labels = [model.label for model in results.models]
    assert labels[:4] == ["seed", "branch code", "branch general", "mixture bam"]
