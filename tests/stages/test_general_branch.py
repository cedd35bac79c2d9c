"""A branch for the general domain, and mixtures whose experts are the branches alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from bam_ray.blobs import open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import CheckpointError
from bam_ray.evaluation.results import Results
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.upcycling import verify
from tests.support.late_branch_run import MIX, LateBranchRun, expert_names
from tests.support.stage_run import TRAINING, make_artifacts, small_recipe

ALONE: dict[str, Any] = {"method": "bam", "seed_expert": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


def test_a_general_branch_takes_the_place_of_the_seed(tmp_path: Path) -> None:
    mixtures = {
        "bam": {**ALONE, "router": {"init": "ridge", "sequences": 8}},
        "soup": {"method": "soup", "seed_expert": False},
    }
    recipe = small_recipe(
        tmp_path,
        branch={"domains": ["general", "code"], "training": TRAINING, "general_fraction": 0.3},
        upcycle={"mixtures": mixtures},
    )
    store, tasks = open_store(str(tmp_path / "store")), task_graph(recipe)
    make_artifacts(recipe, store, tuple(ArtifactKind))

    def artifact(kind: ArtifactKind, name: str) -> Artifact:
        return Artifact(store, kind, find_task(tasks, kind, name).id)

    branch = artifact(ArtifactKind.BRANCHES, "general").manifest()
    assert branch is not None and branch.settings["blend"] == {"general": pytest.approx(1.0)}
    upcycled = artifact(ArtifactKind.UPCYCLED, "bam")
    assert expert_names(upcycled.fetch()) == ["general", "code"]
    assert json.loads(upcycled.read_file("separation.json"))["domains"] == ["general", "code"]
    trained = TensorReader(store, artifact(ArtifactKind.MIXTURES, "bam").prefix)
    assert all(result.passed for result in verify(trained))
    soup, *models = (
        TensorReader(store, artifact(kind, name).prefix)
        for kind, name in (
            (ArtifactKind.UPCYCLED, "soup"),
            (ArtifactKind.BRANCHES, "general"),
            (ArtifactKind.BRANCHES, "code"),
        )
    )
    norm = "model.norm.weight"
    assert soup.read(norm).allclose((models[0].read(norm) + models[1].read(norm)) / 2)
    results = Results.model_validate_json(artifact(ArtifactKind.REPORTS, "report").read_file("results.json"))
    assert [model.label for model in results.models] == [
        "seed",
        "branch general",
        "branch code",
        "mixture bam",
        "mixture soup",
        "ensemble posterior",
        "ensemble uniform",
    ]


def test_a_late_branch_joins_experts_without_the_seed(tmp_path: Path) -> None:
    (tmp_path / "law.jsonl").write_text("\n".join(json.dumps({"text": f"ghij {n} klmn " * 20}) for n in range(40)))
    domains = {name: {"source": str(tmp_path / f"{name}.jsonl")} for name in ("general", "code", "law")}
    data = {"domains": domains, "sequence_length": 32, "held_out_fraction": 0.2, "tokenizer": {"vocab_size": 300}}
    run = LateBranchRun(
        tmp_path,
        data=data,
        branch={"domains": ["code", "general", "law"], "training": TRAINING},
        upcycle={"mixtures": {"bam": ALONE}, "when": {"at_least": 2}},
        mix=MIX,
    )
    with pytest.raises(CheckpointError, match="1 of the 3 branches are committed"):
        run.start()
    run.branch("law")
    make_artifacts(run.recipe, run.store, ("upcycled",))
    run.mix(stop_at=4)
    assert expert_names(run.step("0001.0001-00000004")) == ["code", "law"]
    run.branch("general")
    manifest = run.mix()
    assert manifest is not None
    mixed = Artifact(run.store, ArtifactKind.MIXTURES, manifest.id)
    assert expert_names(mixed.fetch()) == ["code", "law", "general"]
    assert [(event["step"], event["branch"]) for event in run.events("absorbed")] == [(4, "general")]
    assert all(result.passed for result in verify(TensorReader(run.store, mixed.prefix)))
