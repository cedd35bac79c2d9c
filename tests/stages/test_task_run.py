"""A stage works on the task as it was placed, not on the task that the recipe describes."""

from dataclasses import replace
from pathlib import Path

import pytest

from bam_ray.blobs import open_store
from bam_ray.checkpoint.leases import AttemptNumber
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.pipeline.graph import task_graph
from bam_ray.settings import Needs
from bam_ray.stages.run import run_stage
from bam_ray.training.engine import EngineSpec
from bam_ray.training.torch_engine import TorchEngine
from bam_ray.units import GIB
from tests.support.stage_run import TRAINING, make_artifacts, small_recipe, task_run


def test_the_memory_of_a_fallback_reaches_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    needs = {"memory_gib": 4096, "fallback": [{"memory_gib": 4}]}
    recipe = small_recipe(tmp_path, branch={"domains": ["code"], "training": TRAINING, "needs": needs})
    store = open_store(recipe.store.uri)
    make_artifacts(recipe, store, ("corpora", "seeds"))
    limits = []
    create = TorchEngine.__init__

    def record_limit(engine: TorchEngine, spec: EngineSpec) -> None:
        limits.append(spec.memory_limit)
        create(engine, spec)

    monkeypatch.setattr(TorchEngine, "__init__", record_limit)
    run = task_run(recipe, store, "branches", "code")
    (fallback,) = run.task.needs.fallback
    run_stage(replace(run, task=replace(run.task, needs=Needs(**fallback.model_dump()))))
    assert limits == [4 * GIB]


def test_a_task_run_finds_the_artifacts_of_its_run(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    run = task_run(recipe, open_store(recipe.store.uri), "mixtures", "bam")
    ids = {task.full_name: task.id for task in task_graph(recipe)}
    assert run.artifact.prefix == f"mixtures/{ids['mixtures/bam']}"
    assert run.parent(ArtifactKind.BRANCHES, "code").prefix == f"branches/{ids['branches/code']}"
    with pytest.raises(KeyError, match="branches/law"):
        run.parent(ArtifactKind.BRANCHES, "law")


def test_only_rank_zero_takes_a_lease_and_logs(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    store = open_store(recipe.store.uri)
    for rank, count in ((1, None), (0, 1), (1, None), (0, 2)):
        with task_run(recipe, store, "seeds", "seed", rank=rank).attempt() as attempt:
            assert (attempt.lease.number if attempt.lease else None) == (AttemptNumber(1, count) if count else None)
    prefix = attempt.artifact.prefix
    assert [key.removeprefix(prefix) for key in store.list(f"{prefix}/events/")] == [
        "/events/0001.0001.jsonl",
        "/events/0001.0002.jsonl",
    ]
