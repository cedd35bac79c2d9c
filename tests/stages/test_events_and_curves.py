"""The event log, the status notes and the curves of a task that trains."""

import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from bam_ray.blobs import BlobStore, open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import AttemptNumber
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import Interrupted, LossNotFinite, SettingsError, TrainingError
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.settings import Recipe
from bam_ray.training.engine import EngineSpec
from bam_ray.training.flops import training_flops
from bam_ray.training.torch_engine import TorchEngine
from tests.support.stage_run import (
    TRAINING,
    RecordingContext,
    make_artifacts,
    run_task,
    small_recipe,
    tensorboard_curves,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


def seed_prefix(run: Recipe) -> str:
    return f"seeds/{task_graph(run)[1].id}"


def events(store: BlobStore, prefix: str, attempt: int) -> list[dict[str, Any]]:
    lines = store.get(f"{prefix}/events/{AttemptNumber(1, attempt)}.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


def names(log: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in log]


def interrupted_seed(run: Recipe, store: BlobStore, stop_at: int = 6) -> None:
    make_artifacts(run, store, ("corpora",))
    with pytest.raises(Interrupted):
        run_task(run, store, "seeds", "seed", RecordingContext(stop_at))


def test_each_attempt_has_a_log_of_its_events(tmp_path: Path) -> None:
    run = small_recipe(tmp_path)
    store = open_store(run.store.uri)
    interrupted_seed(run, store)
    newest = next(
        key for key in store.list(f"{seed_prefix(run)}/steps/0001.0001-00000006/") if key.endswith("r.safetensors")
    )
    store.put(newest, b"damaged")
    context = RecordingContext()
    manifest = run_task(run, store, "seeds", "seed", context)

    first = events(store, seed_prefix(run), 1)
    assert [name for name in names(first) if name != "checkpoint"] == ["started", "resumed", "computing", "stopped"]
    assert [event["step"] for event in first if event["event"] == "checkpoint"] == [0, 4, 6]
    assert (first[-1]["step"], first[0]["attempt"], first[0]["node"]) == (6, "0001.0001", context.node)
    computing = first[names(first).index("computing")]
    assert {**computing, "time": ""} == {
        "time": "", "event": "computing", "step": 1, "device": "cpu", "precision": "fp32", "micro_batch": 4,
        "processes": 1,
    }  # fmt: skip
    assert all(event["time"].endswith("+00:00") for event in first)

    second = events(store, seed_prefix(run), 2)
    assert names(second) == ["started", "refused", "resumed", "checkpoint", "finished"]
    assert second[1]["checkpoint"] == "0001.0001-00000006"
    assert (second[2]["step"], second[-1]["step"]) == (4, 10)
    assert context.reports[0].note.startswith("skipped a damaged checkpoint: ")
    assert manifest.facts["refused_checkpoints"] == [second[1]["error"]]
    assert manifest.facts["computed_on"] == [
        {"step": 1, "device": "cpu", "precision": "fp32", "micro_batch": 4, "processes": 1},
    ]


def test_failures_and_halved_micro_batches_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_recipe(tmp_path)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora",))
    forward = TorchEngine.forward

    def failing_forward(self: TorchEngine, micro: torch.Tensor, domains: torch.Tensor | None = None) -> Any:
        done = max((progress.step for progress in context.reports), default=0)
        if done == 2 and len(micro) > 2:
            raise torch.OutOfMemoryError
        loss = forward(self, micro, domains)
        return replace(loss, total=loss.total * torch.inf) if done == 5 else loss

    monkeypatch.setattr(TorchEngine, "forward", failing_forward)
    context = RecordingContext()
    with pytest.raises(LossNotFinite, match=r"\(2 in a row\)"):
        run_task(run, store, "seeds", "seed", context)
    log = events(store, seed_prefix(run), 1)
    halved = next(event for event in log if event["event"] == "micro_batch")
    assert (halved["step"], halved["before"], halved["sequences"]) == (3, 4, 2)
    assert names(log)[-2:] == ["rolled_back", "failed"]
    assert log[-1]["error"].startswith("LossNotFinite: step 5: ")
    assert "rolled back from step 6 to 4" in context.reports[-1].note


def test_fewer_processes_than_requested_share_the_experts(tmp_path: Path) -> None:
    """The recipe requests two processes for two experts, but only one process exists."""
    run = small_recipe(tmp_path)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled"))
    context = RecordingContext()
    run_task(run, store, "mixtures", "bam", context)
    mixture = find_task(task_graph(run), "mixtures", "bam").id
    shared = next(event for event in events(store, f"mixtures/{mixture}", 1) if event["event"] == "shared")
    assert [shared[key] for key in ("experts", "processes", "wanted", "workers")] == [2, 1, 2, 1]
    assert context.reports[0].note == "2 experts on 1 processes are shared by 1 of them, not by 2"


def test_a_mixture_that_cannot_start_logs_the_failure(tmp_path: Path) -> None:
    run = small_recipe(tmp_path)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled"))

    def no_memory(spec: EngineSpec) -> Any:
        raise TrainingError("the model does not fit")

    with pytest.raises(TrainingError):
        run_task(run, store, "mixtures", "bam", RecordingContext(), no_memory)
    log = events(store, f"mixtures/{find_task(task_graph(run), 'mixtures', 'bam').id}", 1)
    assert names(log) == ["started", "failed"]
    assert (log[0]["attempt"], log[0]["node"]) == ("0001.0001", "here")
    assert (log[1]["step"], log[1]["error"]) == (0, "TrainingError: the model does not fit")


def test_mfu_uses_the_peak_of_the_recipe(tmp_path: Path) -> None:
    run = small_recipe(tmp_path, metrics={"peak_tflops": 0.5})
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora",))
    context = RecordingContext()
    run_task(run, store, "seeds", "seed", context)
    seen = context.reports[-1].curves
    seed = AutoConfig.from_pretrained(Artifact(store, "seeds", find_task(task_graph(run), "seeds", "seed").id).fetch())
    computed = seen["throughput/tokens_per_second"] * training_flops(seed, run.data.sequence_length, 1)
    assert seen["throughput/mfu"] == pytest.approx(computed / 0.5e12)


def test_curves_have_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    run = small_recipe(tmp_path)
    store = open_store(run.store.uri)
    interrupted_seed(run, store)
    for key in list(store.list(f"{seed_prefix(run)}/steps/0001.0001-00000006/")):
        store.delete(key)  # as if the attempt was killed after steps 5 and 6 were written: training resumes from step 4
    run_task(run, store, "seeds", "seed")
    found = tensorboard_curves(store, seed_prefix(run), tmp_path / "board")
    times = {f"time/{what}" for what in ("data", "compute", "checkpoint")}
    plain = {"loss/nll", "grad_norm", "lr", "throughput/tokens_per_second", "memory/peak_gib"}
    assert set(found) == plain | times
    # The time of a checkpoint is added to the next step. The attempt that writes step 5 starts with it.
    assert [step for step, seconds in found["time/checkpoint"] if seconds] == [1, 9]
    for points in found.values():
        assert [step for step, _ in points] == list(range(1, 11))
    curve = json.loads(Artifact(store, "seeds", task_graph(run)[1].id).read_file("curve.json"))
    assert [value for _, value in found["loss/nll"]] == pytest.approx([point["nll"] for point in curve])


def test_router_metrics_are_written_and_reported(tmp_path: Path) -> None:
    run = small_recipe(tmp_path, metrics={"routing": {"every": 5, "dead_below": 0.999}})
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled"))
    context = RecordingContext()
    manifest = run_task(run, store, "mixtures", "bam", context)
    assert manifest is not None
    found = tensorboard_curves(store, f"mixtures/{manifest.id}", tmp_path / "board")
    below = "routing/layer_0/"
    for name in ("load_seed", "load_code", "entropy", "imbalance", "drift", "attention_drift"):
        assert [step for step, _ in found[below + name]] == [5, 10], name
    seed, code = found[below + "load_seed"][1][1], found[below + "load_code"][1][1]
    assert seed + code == pytest.approx(1.0)
    assert found["load_imbalance"][1][1] == pytest.approx(2 * max(seed, code))
    before, after = (
        TensorReader(store, f"{task.kind}/{task.id}").read("model.layers.0.mlp.gate.weight").float()
        for task in (find_task(task_graph(run), kind, "bam") for kind in ("upcycled", "mixtures"))
    )
    assert found[below + "drift"][1][1] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    assert found[below + "drift"][0][1] > 0
    last = context.reports[-1]
    fine = {name for name in found if name.startswith("routing_by_domain/") and "/layer_" in name}
    assert last.curves == pytest.approx({name: points[-1][1] for name, points in found.items() if name not in fine})
    for domain in ("general", "code"):
        below = f"routing_by_domain/{domain}"
        for name in ("load_seed", "load_code", "entropy", "imbalance", "drift"):
            assert [step for step, _ in found[f"{below}/layer_0/{name}"]] == [5, 10], name
        loads = [found[f"{below}/layer_0/load_{name}"][1][1] for name in ("seed", "code")]
        assert sum(loads) == pytest.approx(1.0)
        assert found[f"{below}/imbalance"][1][1] == pytest.approx(2 * max(loads))
        moved = loads[0] - found[f"{below}/layer_0/load_seed"][0][1]
        assert [drift for _, drift in found[f"{below}/drift"]] == pytest.approx([0.0, abs(moved)], abs=1e-6)
    assert len(fine) == 2 * 5
    assert (last.load_imbalance, last.dead_experts) == (pytest.approx(2 * max(seed, code)), 1)
    lighter = "code" if code < seed else "seed"
    logged = [event for event in events(store, f"mixtures/{manifest.id}", 1) if event["event"] == "experts"]
    assert (logged[-1]["dead"], logged[-1]["overloaded"]) == (f"layer 0 {lighter}", "none")
    assert last.note == f"dead experts: layer 0 {lighter}; overloaded: none"


def test_router_metrics_survive_a_stop_and_a_rollback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With this micro batch, a step is one call of the engine's `forward`
    mix = {"training": {**TRAINING, "micro_batch_sequences": 4}}
    run = small_recipe(tmp_path, metrics={"routing": {"every": 3}}, mix=mix)
    make_artifacts(run, open_store(run.store.uri), ("corpora", "seeds", "branches", "upcycled"))
    id = find_task(task_graph(run), "mixtures", "bam").id

    def copy(name: str) -> BlobStore:
        shutil.copytree(tmp_path / "store", tmp_path / name)
        return open_store(str(tmp_path / name))

    unbroken, stopped, rolled_back = map(copy, ("unbroken", "stopped", "rolled back"))
    run_task(run, unbroken, "mixtures", "bam")
    with pytest.raises(Interrupted):
        run_task(run, stopped, "mixtures", "bam", RecordingContext(stop_at=5))
    run_task(run, stopped, "mixtures", "bam")
    forward, calls = TorchEngine.forward, itertools.count(1)

    def failing_forward(self: TorchEngine, *arguments: torch.Tensor) -> Any:
        loss = forward(self, *arguments)
        return replace(loss, total=loss.total * torch.nan) if next(calls) == 7 else loss

    monkeypatch.setattr(TorchEngine, "forward", failing_forward)
    run_task(run, rolled_back, "mixtures", "bam")
    back = [event["to"] for event in events(rolled_back, f"mixtures/{id}", 1) if event["event"] == "rolled_back"]
    assert back == [4], "training rolls back inside the interval of steps 4 to 6, after 6 was written"

    def routing(store: BlobStore, name: str) -> dict[str, list[tuple[int, float]]]:
        found = tensorboard_curves(store, f"mixtures/{id}", tmp_path / name)
        return {name: points for name, points in found.items() if "routing" in name or name == "load_imbalance"}

    wanted = routing(unbroken, "board")
    assert [step for step, _ in wanted["routing_by_domain/code/layer_0/drift"]] == [3, 6, 9]
    assert wanted["routing_by_domain/code/layer_0/drift"][2][1] > 0
    assert routing(stopped, "stopped board") == wanted
    assert routing(rolled_back, "rolled back board") == wanted


def test_tensorboard_can_be_turned_off(tmp_path: Path) -> None:
    run = small_recipe(tmp_path, metrics={"tensorboard": False})
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds"))
    assert not [key for key in store.list() if "tensorboard" in key]


def test_wandb_is_imported_only_if_the_recipe_names_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import raises ImportError
    run = small_recipe(tmp_path)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds"))
    changed = {
        "metrics": {"wandb_project": "bam"},
        "seed": {**run.seed.model_dump(), "training": {**TRAINING, "seed": 1}},
    }
    with pytest.raises(SettingsError, match="pip install wandb"):
        make_artifacts(small_recipe(tmp_path, **changed), store, ("seeds",))


def test_wandb_gets_every_step_under_the_id_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[int] = []
    started: dict[str, Any] = {}

    def init(**named: Any) -> Any:
        started.update(named)
        return SimpleNamespace(log=lambda scalars, step: logged.append(step), finish=lambda: logged.append(-1))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RuntimeError, Settings=dict))
    run = small_recipe(tmp_path, metrics={"wandb_project": "bam"})
    make_artifacts(run, open_store(run.store.uri), ("corpora", "seeds"))
    assert logged == [*range(1, 11), -1]
    assert (started["project"], started["id"], started["resume"]) == ("bam", task_graph(run)[1].id, "allow")
