"""A late branch that is damaged or does not fit is left out; the mixture, and the run, finish without it."""

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
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import StoreUnavailable
from bam_ray.evaluation.results import Results
from bam_ray.stages import train_mixture
from tests.support.late_branch_run import ControlledRun, LateBranchRun, expert_names
from tests.support.stage_run import (
    TRAINING,
    RecordingContext,
    one_process_engine,
    small_recipe,
)

FFN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


def three(folder: Path) -> dict[str, Any]:
    """The settings `data` with a third domain, `math`."""
    words = random.Random("math")
    texts = [" ".join("".join(words.choices("012345", k=4)) for _ in range(60)) for _ in range(40)]
    (folder / "math.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = small_recipe(folder).data.model_dump()
    return {**data, "domains": {**data["domains"], "math": {"source": str(folder / "math.jsonl")}}}


def damaged(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")


def publish_instead(run: LateBranchRun, folder: Path, spoil: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Commit as the late branch what `spoil` makes of the other branch's weights; its digests are right."""
    shutil.copytree(Artifact(run.store, "branches", run.task("branches", "code").id).fetch(), folder)
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    id = run.task("branches", "general").id
    Artifact(run.store, "branches", id).publish(folder, Manifest(id=id, kind="branches", name="general"))


def finishes_without_the_late_branch(run: LateBranchRun, words: str) -> None:
    """The next attempt leaves it out for what `words` say, and trains on as if it had never come."""
    context = RecordingContext()
    manifest = train_mixture("bam", run.recipe, run.store, context, one_process_engine)
    assert manifest is not None
    told = [(event["step"], event["branch"]) for event in run.events("left_out")]
    assert told == [(4, "general")]
    error = run.events("left_out")[0]["error"]
    assert words in error and "\n" not in error
    assert context.reports[0].note == f"left out general, which came late: {error}"
    assert {(progress.experts, progress.left_out) for progress in context.reports} == {(("seed", "code"), ("general",))}
    assert manifest.facts["left_out"] == ["general"]
    assert manifest.parents == run.mixture.parents
    assert expert_names(Artifact(run.store, "mixtures", manifest.id).fetch()) == ["seed", "code"]
    assert [event["step"] for event in run.events("resumed")] == [0, 4]
    assert run.events("absorbed") == run.events("failed") == []


@pytest.mark.parametrize(
    ("file", "harm", "words"),
    [
        ("model.safetensors", damaged, "does not match its manifest"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated"),
        ("model.safetensors", Path.unlink, "is missing"),
        ("config.json", lambda path: path.write_bytes(b"{"), "is not JSON"),
        ("manifest.json", lambda path: path.write_bytes(b"{"), "is not a manifest"),
    ],
    ids=["changed", "cut-short", "missing", "config", "manifest"],
)
def test_a_late_branch_that_is_damaged_is_left_out(
    tmp_path: Path, file: str, harm: Callable[[Path], object], words: str
) -> None:
    run = LateBranchRun(tmp_path)
    run.start()
    run.mix(stop_at=4)
    late = run.branch("general")
    harm(tmp_path / "store" / "branches" / late.id / file)
    finishes_without_the_late_branch(run, words)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda weights: weights[FFN][0].fill_(float("nan")), "not finite"),
        (lambda weights: weights.pop(FFN), "lacks model.layers.0.mlp.down_proj.weight"),
        (lambda weights: weights.update({FFN: weights[FFN][:-1].clone()}), "shape"),
    ],
    ids=["nan", "lacks", "shape"],
)
def test_a_late_branch_that_does_not_fit_is_left_out(
    tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    run = LateBranchRun(tmp_path)
    run.start()
    run.mix(stop_at=4)
    publish_instead(run, tmp_path / "spoilt", spoil)
    finishes_without_the_late_branch(run, words)


def test_of_two_late_branches_the_good_one_is_absorbed(tmp_path: Path) -> None:
    run = LateBranchRun(
        tmp_path, branch={"domains": ["code", "general", "math"], "training": TRAINING}, data=three(tmp_path)
    )
    run.start()
    run.mix(stop_at=4)
    late = {name: run.branch(name) for name in ("general", "math")}
    damaged(tmp_path / "store" / "branches" / late["general"].id / "model.safetensors")
    manifest = run.mix()
    assert manifest is not None
    assert [event["branch"] for event in run.events("left_out")] == ["general"]
    assert [event["branch"] for event in run.events("absorbed")] == ["math"]
    assert expert_names(Artifact(run.store, "mixtures", manifest.id).fetch()) == ["seed", "code", "math"]
    assert manifest.facts["left_out"] == ["general"]
    assert manifest.parents == (*run.mixture.parents, late["math"].id)


def test_a_late_branch_that_was_mended_is_absorbed_by_the_next_attempt(tmp_path: Path) -> None:
    run = LateBranchRun(tmp_path)
    run.start()
    run.mix(stop_at=4)
    weights = tmp_path / "store" / "branches" / run.branch("general").id / "model.safetensors"
    whole = weights.read_bytes()
    damaged(weights)
    run.mix(stop_at=7)
    weights.write_bytes(whole)
    run.mix()
    assert [event["step"] for event in run.events("left_out")] == [4]
    assert [event["step"] for event in run.events("absorbed")] == [7]


def test_a_store_that_is_away_leaves_no_branch_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = LateBranchRun(tmp_path)
    run.start()
    run.mix(stop_at=4)
    run.branch("general")

    def away(reader: TensorReader) -> int:
        raise StoreUnavailable("the endpoint is down")

    with monkeypatch.context() as patch:
        patch.setattr(TensorReader, "check_digests", away)
        with pytest.raises(StoreUnavailable, match="down"):
            train_mixture("bam", run.recipe, run.store, RecordingContext(), one_process_engine)
    assert [event["attempt"] for event in run.events("started")] == [1, 2]
    assert [event["error"] for event in run.events("failed")] == ["StoreUnavailable: the endpoint is down"]
    manifest = run.mix()
    assert manifest is not None
    assert run.events("left_out") == []
    assert [event["step"] for event in run.events("absorbed")] == [4]


def test_a_run_with_a_damaged_late_branch_finishes_and_stops_for_it_once(tmp_path: Path) -> None:
    run = LateBranchRun(tmp_path)
    weights = tmp_path / "store" / "branches" / run.task("branches", "general").id / "model.safetensors"
    # The controller learns of it once its stage has returned: it is damaged by then
    assert ControlledRun(run, lambda: damaged(weights)).causes == ["to absorb general", "committed"]
    assert [(event["step"], event["branch"]) for event in run.events("left_out")] == [(4, "general")]
    assert expert_names(Artifact(run.store, "mixtures", run.mixture.id).fetch()) == ["seed", "code"]
    report = run.task("reports", "report")
    results = Results.model_validate_json(run.store.get(f"reports/{report.id}/results.json"))
    assert [model.label for model in results.models] == ["seed", "branch code", "mixture bam"]
