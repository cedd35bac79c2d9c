"""A mixture trained by the stage itself on two processes, with every option of `mix` that changes what is learned."""

import json
from pathlib import Path
from typing import Any

import pytest
from gloo_ranks import run_on_ranks
from mix_scenario import mix
from stages.test_story import TRAINING, make, recipe

from bam_ray.blobs import open_store

pytestmark = pytest.mark.slow

MIX = {
    "training": {**TRAINING, "micro_batch_sequences": 1, "on_spike": "skip", "spike": {"window": 3}},
    "gate": "noisy",
    "capacity_factor": 0.75,
    "losses": {"load_balance": {"start": 0.1, "end": 0.01, "steps_fraction": 0.5}, "bias_rate": 0.01},
    "router_warmup_fraction": 0.2,
    "expert_lr_factor": 0.5,
    "dynamic_blend": {"every": 3, "sequences": 8},
}


def test_it_resumes_exactly_with_all_that_is_learned_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = str(tmp_path / "cache")
    monkeypatch.setenv("BAM_CACHE", cache)
    data = {**recipe(tmp_path).data.model_dump(), "attend_across_documents": False}
    run = recipe(tmp_path, mix=MIX, data=data)
    curves: list[list[dict[str, float]]] = []
    for number, stop_at in enumerate((None, 7)):
        uri = str(tmp_path / f"store-{number}")
        store = open_store(uri)
        make(run, store, ("corpora", "seeds", "branches", "upcycled"))
        first, second = run_on_ranks(2, mix, run, uri, stop_at, cache)
        assert (first["steps"], second["steps"], second["id"]) == (10, 10, None)
        assert first["imbalance"] >= 1.0 and second["imbalance"] is None  # rank 0 watches
        prefix = f"mixtures/{first['id']}"
        curve: list[dict[str, float]] = json.loads(store.get(f"{prefix}/curve.json"))
        curves.append([{key: value for key, value in point.items() if key != "tokens_per_second"} for point in curve])
        log: list[dict[str, Any]] = [
            json.loads(line)
            for key in sorted(store.list(f"{prefix}/events/"))
            for line in store.get(key).decode().splitlines()
        ]
        moves = [event for event in log if event["event"] == "blend"]
        assert [move["step"] for move in moves] == [3, 6, 9]
        config = json.loads(store.get(f"{prefix}/config.json"))
        assert config["noisy_gate"] and config["selection_bias"] and config["capacity_factor"] == 0.75
    assert curves[0] == curves[1]
