"""The mix stage on two processes, with every setting of `mix` that changes the training objective."""

import json
from pathlib import Path
from typing import Any

import pytest

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.model import BamConfig
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.training.flops import training_flops
from tests.support.distributed.gloo_ranks import run_on_ranks
from tests.support.distributed.mix_stage import absorb_late_branch, train_and_resume, wait_for_rank_0
from tests.support.stage_run import (
    TRAINING,
    make_artifacts,
    run_task,
    small_recipe,
)

pytestmark = pytest.mark.slow

MIX = {
    "training": {**TRAINING, "micro_batch_sequences": 1, "on_spike": "skip", "spike": {"window": 3}},
    "capacity_factor": 0.75,
    "losses": {
        "load_balance": {"start": 0.1, "end": 0.01, "steps_fraction": 0.5},
        "router_z": {"start": 0.01, "end": 0.001},
    },
    "router_warmup_fraction": 0.2,
    "expert_lr_factor": 0.5,
    "dynamic_blend": {"every": 3, "sequences": 8},
}
NOISY = {**MIX, "gate": "noisy"}
BIASED = {**MIX, "losses": {**MIX["losses"], "bias_rate": 0.01}}


def test_mixture_resumes_exactly_with_all_mixing_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = str(tmp_path / "cache")
    monkeypatch.setenv("BAM_CACHE", cache)
    data = {**small_recipe(tmp_path).data.model_dump(), "attend_across_documents": False}
    run = small_recipe(tmp_path, mix=NOISY, data=data, metrics={"peak_tflops": 0.5})
    curves: list[list[dict[str, float]]] = []
    for number, stop_at in enumerate((None, 7)):
        uri = str(tmp_path / f"store-{number}")
        store = open_store(uri)
        make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled"))
        first, second = run_on_ranks(2, train_and_resume, run, uri, stop_at, cache)
        assert (first["steps"], second["steps"], second["id"]) == (10, 10, None)
        assert first["imbalance"] >= 1.0 and second["imbalance"] is None  # only rank 0 computes router metrics
        prefix = f"mixtures/{first['id']}"
        curve: list[dict[str, float]] = json.loads(Artifact(store, "mixtures", first["id"]).read_file("curve.json"))
        curves.append([{key: value for key, value in point.items() if key != "tokens_per_second"} for point in curve])
        log: list[dict[str, Any]] = [
            json.loads(line)
            for key in sorted(store.list(f"{prefix}/events/"))
            for line in store.get(key).decode().splitlines()
        ]
        moves = [event for event in log if event["event"] == "blend"]
        assert [move["step"] for move in moves] == [3, 6, 9]
        config = json.loads(Artifact(store, "mixtures", first["id"]).read_file("config.json"))
        computed = first["curves"]["throughput/tokens_per_second"] * training_flops(BamConfig(**config), 32, 1)
        assert first["curves"]["throughput/mfu"] == pytest.approx(computed / (2 * 0.5e12)), "of both processes"
        assert config["noisy_gate"] and config["capacity_factor"] == 0.75
        assert (config["router_aux_loss_coef"], config["router_z_loss_coef"]) == (0.01, 0.001)
    assert curves[0] == curves[1]


def test_late_branch_joins_experts_that_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three experts cannot be divided among two processes; with the late branch there are four."""
    cache = str(tmp_path / "cache")
    monkeypatch.setenv("BAM_CACHE", cache)
    run = small_recipe(
        tmp_path,
        branch={"domains": ["code", "general"], "training": TRAINING},
        upcycle={"mixtures": {"bam": {"method": "bam", "num_experts": 4}}, "when": {"at_least": 1}},
        mix={**BIASED, "expert_parallel": 2},
    )
    curves = []
    for number, stops in enumerate(((4, None), (4, 7, None))):
        uri = str(tmp_path / f"store-{number}")
        store = open_store(uri)
        make_artifacts(run, store, ("corpora", "seeds"))
        run_task(run, store, "branches", "code")
        make_artifacts(run, store, ("upcycled",))
        first, _ = run_on_ranks(2, absorb_late_branch, run, uri, stops, cache)
        assert first["experts"] == ("seed", "code", "seed-2", "general")
        assert first["shared"] == [3, *(2 for _ in stops[1:])]
        curves.append(losses(store, find_task(task_graph(run), "mixtures", "bam").id))
    assert len(curves[0]) == 10
    assert curves[0] == curves[1]


def test_partitioned_weights_give_the_same_losses_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 alone reads the routers, even if ZeRO-3 partitions all weights over the ranks."""
    cache = str(tmp_path / "cache")
    monkeypatch.setenv("BAM_CACHE", cache)
    curves, watched = [], []
    for zero_stage, stop_at in ((1, None), (3, 7)):
        training = {**MIX["training"], "zero_stage": zero_stage}
        run = small_recipe(
            tmp_path,
            mix={**MIX, "training": training, "expert_parallel": 1, "workers": 2},
            metrics={"routing": {"every": 2}},
        )
        uri = str(tmp_path / f"store-{zero_stage}")
        store = open_store(uri)
        make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled"))
        first, _ = run_on_ranks(2, train_and_resume, run, uri, stop_at, cache)
        curves.append(losses(store, first["id"]))
        watched.append({name: value for name, value in first["curves"].items() if name.startswith("routing/")})
    assert len(curves[0]) == 10
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert watched[1] == pytest.approx(watched[0], rel=1e-3)
    assert watched[1]["routing/layer_0/drift"] > 0 and watched[1]["routing/layer_0/attention_drift"] > 0


def test_ranks_wait_longer_for_an_absorption_than_for_a_step() -> None:
    done, past = run_on_ranks(2, wait_for_rank_0, 10.0)
    assert past >= done


def losses(store: BlobStore, id: str) -> list[float]:
    return [point["nll"] for point in json.loads(Artifact(store, "mixtures", id).read_file("curve.json"))]
