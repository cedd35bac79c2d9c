"""A training state goes to a file tensor by tensor, and its memory is free as soon as it is there."""

import gc
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.settings import TrainingSettings
from bam_ray.stages.publish import write_model
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.engine import EngineSpec
from bam_ray.training.state import read_optimizer, read_weights
from bam_ray.training.tensor_file import HostCopier, specs_of, write_tensors
from bam_ray.training.torch_engine import TorchEngine
from tests.support import tiny
from tests.support.leases import next_lease
from tests.support.state_parts import part_of

TENSORS = {
    "step": torch.tensor(7),
    "weight": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "empty": torch.zeros(0, 3),
    "half": torch.ones(5, dtype=torch.bfloat16),
}


def trained_engine() -> TorchEngine:
    """Return an engine after one step."""
    torch.manual_seed(0)
    settings = TrainingSettings(tokens=1, peak_lr=1e-3, micro_batch_sequences=2)
    engine = TorchEngine(EngineSpec(AutoModelForCausalLM.from_config(tiny.CONFIGS["cohere"]), settings))
    engine.step(tiny.tokens(2, 12), 1e-3)
    return engine


def test_other_libraries_read_the_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file.safetensors", specs_of(TENSORS), TENSORS.values())
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_only_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def made() -> Iterator[Tensor]:
        for number in range(5):
            gc.collect()
            assert sum(tensor() is not None for tensor in alive) <= 1
            tensor = torch.full((1000,), float(number))
            alive.append(weakref.ref(tensor))
            yield tensor

    specs = specs_of({f"{number}": torch.empty(1000) for number in range(5)})
    write_tensors(tmp_path / "file.safetensors", specs, made())
    assert len(alive) == 5


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_a_state_in_parts_is_read_like_a_whole_one(parts: int, tmp_path: Path) -> None:
    state = trained_engine().state()
    assert state is not None
    for part in range(parts):
        part_of(state, part, parts).write(tmp_path)
    found, step = read_optimizer(tmp_path)
    assert step == 1
    assert found.keys() == state.optimizer.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.optimizer.items())
    weights = read_weights(tmp_path)
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.weights.items())
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["CohereForCausalLM"]


def test_a_part_is_copied_if_there_is_room(tmp_path: Path) -> None:
    state = trained_engine().state()
    assert state is not None
    part = replace(part_of(state, 1, 2), live=True)
    size = sum(each.values.nbytes for each in (*part.weights, *part.optimizer))
    assert part.snapshot(size - 1) is part
    copied = part.snapshot(size)
    assert not copied.live
    part.weights[0].values.fill_(7.0)
    assert copied.weights[0].values.max() < 7.0


def test_a_copy_is_private() -> None:
    tensor = torch.ones(3)
    copy = HostCopier().copy(tensor)
    tensor += 1
    assert copy.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_publishing_copies_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    engine = trained_engine()
    specs, weights = engine.whole_weights()
    live = engine.model.state_dict()
    held = {tensor.data_ptr() for tensor in live.values()}

    def watched() -> Iterator[Tensor]:
        for tensor in weights:
            assert tensor.data_ptr() in held
            yield tensor

    write_model(engine.model, specs, watched(), tmp_path, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == dtype
    assert all(torch.equal(tensor, live[name].to(dtype)) for name, tensor in loaded.state_dict().items())


def test_a_state_is_freed_when_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    store, uploading, done = MemoryStore(), threading.Event(), threading.Event()
    artifact = Artifact(store, ArtifactKind.BRANCHES, "law")
    checkpoints = Checkpoints(artifact, next_lease(store, artifact.prefix), Retention(2, None))
    upload = Artifact.upload

    def slow(self: Artifact, *arguments: Any, **named: Any) -> Any:
        uploading.set()
        assert done.wait(30)
        return upload(self, *arguments, **named)

    monkeypatch.setattr(Artifact, "upload", slow)
    state = trained_engine().state()
    name = "model.norm.weight"
    copied = weakref.ref(state.weights[name])
    checkpoints.save(state, {"step": 1})
    del state
    assert uploading.wait(30)
    gc.collect()
    assert copied() is None, "the upload holds a state that is on the disk already"
    done.set()
    checkpoints.wait()
