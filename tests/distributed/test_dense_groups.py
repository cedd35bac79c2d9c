"""Seeds and branches are the same if one process or several train them, and if that number changes."""

import json
from pathlib import Path
from typing import Any

import pytest

from bam_ray.blobs import open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import Interrupted
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.settings import Recipe
from tests.support.distributed.dense_groups import run_tasks_on_rank
from tests.support.distributed.gloo_ranks import run_on_ranks
from tests.support.stage_run import (
    TRAINING,
    RecordingContext,
    make_artifacts,
    run_task,
    small_recipe,
)

pytestmark = pytest.mark.slow


def recipe_with_stage(folder: Path, store: str, zero_stage: int) -> Recipe:
    """Return a recipe whose seed and branch are trained by two workers at a ZeRO stage."""
    training = {**TRAINING, "zero_stage": zero_stage}
    plain = small_recipe(folder).model_dump()
    seed = {**plain["seed"], "training": training, "workers": 2}
    return small_recipe(
        folder,
        store={"uri": str(folder / store)},
        seed=seed,
        branch={"domains": ["code"], "training": training, "workers": 2},
    )


def curve(run: Recipe, kind: ArtifactKind, name: str) -> list[dict[str, Any]]:
    task = find_task(task_graph(run), kind, name)
    artifact = Artifact(open_store(run.store.uri), kind, task.id)
    points: list[dict[str, Any]] = json.loads((artifact.fetch() / "curve.json").read_text())
    return points


def test_several_processes_train_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    alone = recipe_with_stage(tmp_path, "alone", 1)
    make_artifacts(alone, open_store(alone.store.uri), ("corpora", "seeds", "branches"))

    second, third = (recipe_with_stage(tmp_path, "together", stage) for stage in (2, 3))
    store = open_store(second.store.uri)
    make_artifacts(second, store, ("corpora",))
    tasks: list[tuple[ArtifactKind, str, int | None]] = [("seeds", "seed", None), ("branches", "code", 3)]
    first, other = run_on_ranks(2, run_tasks_on_rank, second, tasks, str(tmp_path / "of-ranks"))
    seed, branch = task_graph(second)[1:3]
    assert (first[0], other[0]) == (seed.id, "nothing")
    assert first[1] == other[1] == "stopped at step 3 of 10: run the same command to resume"
    with pytest.raises(Interrupted, match="step 6 of 10"):
        run_task(third, store, "branches", "code", RecordingContext(6))
    outcomes = run_on_ranks(4, run_tasks_on_rank, third, [("branches", "code", None)], str(tmp_path / "of-ranks"))
    assert outcomes == [[branch.id], ["nothing"], ["nothing"], ["nothing"]]
    assert task_graph(alone) == task_graph(third), "the number of workers is not part of an identity"

    for kind, name in (("seeds", "seed"), ("branches", "code")):
        pairs = list(zip(curve(third, kind, name), curve(alone, kind, name), strict=True))
        assert len(pairs) == 10
        for made, wanted in pairs:
            assert made["nll"] == pytest.approx(wanted["nll"], rel=1e-5)
            assert made["lr"] == wanted["lr"]
    manifest = Artifact(store, "branches", branch.id).manifest()
    assert manifest is not None
    assert manifest.attempt == "0001.0003"
    assert manifest.facts["sequences_drawn"]["code"] > 0
    events = [key for key in store.list(f"branches/{branch.id}/events/")]
    assert len(events) == 3, "only rank 0 writes events"


def test_controls_with_a_prior_train_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    names = ["dense-prior-tables", "dense-prior-vectors"]
    alone, together = (
        small_recipe(
            tmp_path, store={"uri": str(tmp_path / name)}, compare={"prior": ["tables", "vectors"], "workers": workers}
        )
        for name, workers in (("alone", 1), ("together", 2))
    )
    make_artifacts(alone, open_store(alone.store.uri), ("corpora", "seeds", "controls"))
    make_artifacts(together, open_store(together.store.uri), ("corpora", "seeds"))
    tasks: list[tuple[ArtifactKind, str, int | None]] = [(ArtifactKind.CONTROLS, name, None) for name in names]
    first, other = run_on_ranks(2, run_tasks_on_rank, together, tasks, str(tmp_path / "of-ranks"))
    assert first == [find_task(task_graph(alone), ArtifactKind.CONTROLS, name).id for name in names]
    assert other == ["nothing", "nothing"]
    for name in names:
        pairs = list(
            zip(curve(together, ArtifactKind.CONTROLS, name), curve(alone, ArtifactKind.CONTROLS, name), strict=True)
        )
        assert len(pairs) == 20
        for made, wanted in pairs:
            assert made["nll"] == pytest.approx(wanted["nll"], rel=1e-5)
