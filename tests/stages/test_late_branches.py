"""Mixing starts with the committed branches, and a late one becomes an expert of the newest checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import CheckpointError, Interrupted
from bam_ray.evaluation.results import Results
from bam_ray.families import EMBEDDING_ROUTERS, PRIOR_PAIRS, PRIOR_TOKENS
from bam_ray.pipeline.tasks import Progress
from bam_ray.settings import StoreSettings
from bam_ray.stages.token_counts import read_token_counts
from bam_ray.toolbox.step_export import export_step
from bam_ray.training.flops import training_flops
from tests.support.late_branch_run import MIX, ControlledRun, LateBranchRun, expert_names
from tests.support.stage_run import (
    TRAINING,
    RecordingContext,
    make_artifacts,
    run_task,
    tensorboard_curves,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


class CrashingContext(RecordingContext):
    """The context of an attempt that crashes at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def report(self, progress: Progress) -> None:
        if progress.step == self._step:
            raise ConnectionAbortedError
        super().report(progress)


def history_of(folder: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads((folder / "lineage.json").read_text())["history"]
    return history


@pytest.mark.parametrize(
    ("zero", "balanced"),
    [("noise_weight", {}), ("selection_bias", {"gate": "plain", "losses": {"bias_rate": 0.01}})],
)
def test_a_late_branch_becomes_an_expert_of_a_checkpoint(tmp_path: Path, zero: str, balanced: dict[str, Any]) -> None:
    run = LateBranchRun(tmp_path, mix={**MIX, **balanced})
    run.start()
    assert run.mix(stop_at=6) is None
    late = run.branch("general")
    with pytest.raises(ConnectionAbortedError):
        run_task(run.recipe, run.store, "mixtures", "bam", CrashingContext(step=7))
    assert [(event["step"], event["branch"]) for event in run.events("absorbed")] == [(6, "general")]

    before, after = run.step("0001.0001-00000006"), run.step("0001.0002-00000006")
    assert expert_names(before) == ["seed", "code"]
    assert expert_names(after) == ["seed", "code", "general"]
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    branch = load_file(Artifact(run.store, "branches", late.id).fetch() / "model.safetensors")
    assert set(old) == set(new)
    for name, weight in old.items():
        assert torch.equal(new[name][: len(weight)], weight), f"{name}: the existing part is unchanged"
        assert (len(new[name]) == 3) == (len(weight) == 2 and (".gate." in name or "experts." in name)), name
    assert torch.equal(new["model.layers.0.mlp.experts.down_proj"][2], branch["model.layers.0.mlp.down_proj.weight"])
    assert new["model.layers.0.mlp.gate.weight"][2].std() == pytest.approx(0.02, rel=0.5)
    assert not new[f"model.layers.0.mlp.gate.{zero}"][2].any()
    assert old[f"model.layers.0.mlp.gate.{zero}"].any(), "the old experts' values were trained"
    old, new = load_file(before / "optimizer.safetensors"), load_file(after / "optimizer.safetensors")
    assert set(old) == set(new)
    for name, state in old.items():
        if name == "step":
            assert state == new[name]
            continue
        assert torch.equal(new[name][: len(state)], state), name
        assert not new[name][len(state) :].any(), f"{name}: the state of the new expert is zero"
    first, second = (json.loads((folder / "trainer.json").read_text()) for folder in (before, after))
    assert second == {**first, "sampler": {**first["sampler"], "reference": None}, "changed": 6}

    # The next attempt resumes with the new expert, and absorbs nothing again
    manifest = run.mix()
    assert manifest is not None
    assert [event["step"] for event in run.events("resumed")] == [0, 6, 6]
    folder = Artifact(run.store, "mixtures", manifest.id).fetch()
    assert expert_names(folder) == AutoModelForCausalLM.from_pretrained(folder).config.expert_names
    assert expert_names(folder) == ["seed", "code", "general"]
    assert len(run.events("absorbed")) == 1
    assert len(run.losses()) == 10
    upcycled, absorb = history_of(folder)
    assert list(upcycled["of"]) == ["seed", "code"]
    assert (absorb["absorb"]["experts"], absorb["absorb"]["step"]) == (["seed", "code", "general"], 6)
    assert absorb["of"] == {
        "mixture": f"{run.store.uri}/mixtures/{run.mixture.id}/steps/0001.0001-00000006",
        "general": f"{run.store.uri}/branches/{late.id}",
    }
    assert manifest.parents == (*run.mixture.parents, late.id)
    assert manifest.facts["left_out"] == []
    config = AutoModelForCausalLM.from_pretrained(folder).config
    three = training_flops(config, 32, 1)
    config.num_experts = 2
    two = training_flops(config, 32, 1)
    assert manifest.compute.flops == pytest.approx(128 * (6 * two + 4 * three))
    assert two < three
    export_step(run.store, "mixtures", "bam", StoreSettings(uri=str(tmp_path / "eight")), step=8)
    assert history_of(tmp_path / "eight") == [upcycled, absorb]


def test_a_late_branch_brings_its_tables_and_counts(tmp_path: Path) -> None:
    router = {"init": "zero", "input": "prefix", "prior": "bigram"}
    mixture = {"method": "bam", "embeddings": "experts", "router": router}
    losses = []
    for number, stop in enumerate((3, None)):  # once with a stop after the absorption
        upcycle = {"mixtures": {"bam": mixture}, "when": {"at_least": 1}}
        run = LateBranchRun(tmp_path, f"store-{number}", upcycle=upcycle)
        run.start()
        assert run.mix(stop_at=3) is None
        late = run.branch("general")
        if stop is not None:
            assert run.mix(stop_at=stop) is None
        manifest = run.mix()
        assert manifest is not None
        losses.append(run.losses())
    assert losses[0] == losses[1] and len(losses[0]) == 10 and losses[0][-1] < losses[0][0]

    before, after = run.step("0001.0001-00000003"), run.step("0001.0002-00000003")
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    branch = load_file(Artifact(run.store, "branches", late.id).fetch() / "model.safetensors")
    counts = read_token_counts(run.corpus(), ["general", "code"])
    tables = {"model.embed_tokens.experts.weight": "model.embed_tokens.weight"}
    if "lm_head.weight" in branch:
        tables["lm_head.experts.weight"] = "lm_head.weight"
    for name, dense in tables.items():
        assert torch.equal(new[name][:2], old[name]) and torch.equal(new[name][2], branch[dense])
    for name, domains in ((PRIOR_TOKENS, "tokens"), (PRIOR_PAIRS, "pairs")):
        expected = torch.stack([getattr(counts[each], domains) for each in ("general", "code", "general")])
        assert torch.equal(new[name], expected.to(new[name].dtype)) and new[name].dtype == old[name].dtype
    for name in EMBEDDING_ROUTERS:
        assert torch.equal(new[name][:2], old[name]) and old[name].any() and not new[name][2].any()
    states = load_file(after / "optimizer.safetensors")
    assert not {name for name in states if ".prior." in name}
    for name, state in load_file(before / "optimizer.safetensors").items():
        if name.startswith((*tables, *EMBEDDING_ROUTERS)):
            assert torch.equal(states[name][:2], state) and state.any()
            assert len(states[name]) == 3 and not states[name][2].any()
    made = load_file(Artifact(run.store, "mixtures", run.mixture.id).fetch() / "model.safetensors")
    for name in (PRIOR_TOKENS, PRIOR_PAIRS):
        assert torch.equal(made[name], new[name]), "training does not change counts"
    assert not torch.equal(made["model.embed_tokens.experts.weight"][2], branch["model.embed_tokens.weight"])


def test_training_resumes_exactly_after_a_branch_is_absorbed(tmp_path: Path) -> None:
    losses, seen = [], []
    for number, stops in enumerate(
        ((4, None), (4, 7, None), (4, 4, None))
    ):  # the last case stops right after the absorption
        run = LateBranchRun(tmp_path, f"store-{number}", metrics={"routing": {"every": 3}})
        run.start()
        first, *others = stops
        run.mix(first)
        run.branch("general")
        for stop_at in others:
            run.mix(stop_at)
        losses.append(run.losses())
        found = tensorboard_curves(run.store, f"mixtures/{run.mixture.id}", tmp_path / f"board-{number}")
        seen.append({name: points for name, points in found.items() if name.startswith("routing_by_domain/")})
        assert [move["step"] for move in run.events("blend")] == [3, 6, 9]
    assert losses[0] == losses[1] == losses[2]
    assert seen[0] == seen[1] == seen[2]
    load, drift = (seen[0][f"routing_by_domain/general/layer_0/{name}"] for name in ("load_general", "drift"))
    assert [step for step, _ in load] == [6, 9], "the branch is absorbed inside the interval of steps 4 to 6"
    for (_, part), (_, moved) in zip(load, drift[1:], strict=True):
        assert 0 < part <= moved + 1e-6, "all load of a new expert is moved load"
    assert losses[0][-1] < losses[0][0]


def test_a_branch_committed_before_the_first_step_is_added_at_step_0(tmp_path: Path) -> None:
    run = LateBranchRun(tmp_path)
    run.start()
    run.branch("general")
    run.mix(stop_at=2)
    assert [(event["step"], event["branch"]) for event in run.events("absorbed")] == [(0, "general")]
    assert expert_names(run.step("0001.0001-00000000")) == ["seed", "code", "general"]
    manifest = run.mix()
    assert manifest is not None
    assert history_of(Artifact(run.store, "mixtures", manifest.id).fetch())[-1]["absorb"]["step"] == 0


def test_a_branch_committed_after_the_mixture_is_left_out(tmp_path: Path) -> None:
    run = LateBranchRun(tmp_path)
    run.start()
    manifest = run.mix()
    assert manifest is not None
    run.branch("general")
    assert manifest.facts["left_out"] == ["general"]
    assert manifest.parents == run.mixture.parents
    report = run_task(run.recipe, run.store, "reports", "report")
    results = Results.model_validate_json(Artifact(run.store, "reports", report.id).read_file("results.json"))
    mixture = next(model for model in results.models if model.kind == "mixtures")
    assert mixture.routing is not None
    assert mixture.routing.expert_names == ("seed", "code")
    assert mixture.lineage_tokens == 3 * 1280, "of the seed, one branch and the mixture"


def test_a_report_leaves_out_a_branch_that_is_never_committed(tmp_path: Path) -> None:
    run = LateBranchRun(tmp_path)
    run.start()
    run.mix()
    report = run_task(run.recipe, run.store, "reports", "report")
    results = Results.model_validate_json(Artifact(run.store, "reports", report.id).read_file("results.json"))
    labels = [model.label for model in results.models]
    assert labels == ["seed", "branch code", "mixture bam", "ensemble posterior", "ensemble uniform"]
    assert results.models[3].lineage_tokens == 2 * 1280, "of the seed and one branch"
    assert run.task(ArtifactKind.BRANCHES, "general").id not in report.parents


class StoppedContext(RecordingContext):
    """The context of an attempt that is asked to stop from its start."""

    def should_stop(self) -> bool:
        """Return True."""
        return True


def test_the_starting_branches_are_decided_once(tmp_path: Path) -> None:
    run = LateBranchRun(tmp_path)
    make_artifacts(run.recipe, run.store, ("corpora", "seeds"))
    with pytest.raises(
        CheckpointError, match=r"0 of the 2 branches are committed, but upcycle\.when requires at least 1"
    ):
        make_artifacts(run.recipe, run.store, ("upcycled",))
    run.branch("code")

    with pytest.raises(Interrupted):
        run_task(run.recipe, run.store, "upcycled", "bam", StoppedContext())
    late = run.branch("general")
    manifest = run_task(run.recipe, run.store, "upcycled", "bam")
    assert expert_names(Artifact(run.store, "upcycled", manifest.id).fetch()) == ["seed", "code"]
    assert late.id not in manifest.parents and len(manifest.parents) == 2


def test_a_starting_branch_that_was_damaged_is_replaced(tmp_path: Path) -> None:
    run = LateBranchRun(tmp_path)
    make_artifacts(run.recipe, run.store, ("corpora", "seeds"))
    code = run.branch("code")

    with pytest.raises(Interrupted):
        run_task(run.recipe, run.store, "upcycled", "bam", StoppedContext())
    run.branch("general")
    Artifact(run.store, "branches", code.id).set_aside(code, "a file is damaged")
    manifest = run_task(run.recipe, run.store, "upcycled", "bam")
    assert expert_names(Artifact(run.store, "upcycled", manifest.id).fetch()) == ["seed", "general"]


def test_a_missing_branch_changes_averages_copies_and_routers(tmp_path: Path) -> None:
    mixture = {
        "method": "btx",
        "num_experts": 4,
        "average": {"weights": {"code": 2.0, "general": 3.0}},
        "router": {"init": "means", "sequences": 8},
    }
    mix = {"training": {**TRAINING, "keep_every": 1}, "expert_parallel": 2}
    run = LateBranchRun(tmp_path, upcycle={"mixtures": {"bam": mixture}, "when": {"at_least": 1}}, mix=mix)
    run.start()
    run.mix(stop_at=2)
    assert expert_names(run.step("0001.0001-00000002")) == ["seed", "code", "seed-2"]
    assert [(event["experts"], event["processes"]) for event in run.events("shared")] == [(3, 1)]
    run.branch("general")
    manifest = run.mix()
    assert manifest is not None
    assert expert_names(Artifact(run.store, "mixtures", manifest.id).fetch()) == ["seed", "code", "seed-2", "general"]


def test_a_controlled_run_absorbs_the_slow_branch(tmp_path: Path) -> None:
    run = LateBranchRun(tmp_path)
    assert ControlledRun(run).causes == ["to absorb general", "committed"]
    assert [(event["step"], event["branch"]) for event in run.events("absorbed")] == [(4, "general")]
    folder = Artifact(run.store, "mixtures", run.mixture.id).fetch()
    assert expert_names(folder) == ["seed", "code", "general"]
    report = run.task(ArtifactKind.REPORTS, "report")
    results = Results.model_validate_json(Artifact(run.store, "reports", report.id).read_file("results.json"))
    assert next(model for model in results.models if model.kind == "mixtures").lineage_tokens == 4 * 1280
