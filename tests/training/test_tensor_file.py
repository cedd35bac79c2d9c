"""A training state goes to a file tensor by tensor, and its memory is free as soon as it is there."""

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import TrainingError
from bam_ray.settings import TrainingSettings
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.engine import EngineSpec
from bam_ray.training.state import TrainingState, read_optimizer, read_weights, spill_optimizer
from bam_ray.training.tensor_file import HostCopier, specs_of, write_tensors
from bam_ray.training.torch_engine import TorchEngine
from tests.support import tiny
from tests.support.leases import next_lease

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


def test_a_spilled_optimizer_is_read_like_any_other(tmp_path: Path) -> None:
    engine = trained_engine()
    state = engine.state()
    spilled = spill_optimizer(specs_of(state.optimizer), state.optimizer.values(), state.step)
    TrainingState(state.model, state.weights, {}, state.step, True, spilled).write(tmp_path)
    assert not spilled.parent.exists(), "nothing is left in TMPDIR"
    found, step = read_optimizer(tmp_path)
    assert step == 1
    assert found.keys() == state.optimizer.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.optimizer.items())


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(TrainingError, match=r"no checkpoint can be written to .*free space there or set TMPDIR"):
        spill_optimizer([], [], 1)


def test_a_copy_is_private() -> None:
    tensor = torch.ones(3)
    copy = HostCopier().copy(tensor)
    tensor += 1
    assert copy.tolist() == [1.0, 1.0, 1.0]
    assert HostCopier().to_host(tensor) is tensor


def test_publishing_copies_nothing(tmp_path: Path) -> None:
    engine = trained_engine()
    state = engine.state(only_weights=True)
    assert state.optimizer == {}
    weight = "model.norm.weight"
    assert state.weights[weight].data_ptr() == engine.model.state_dict()[weight].data_ptr()
    state.write_model(tmp_path)
    assert torch.equal(read_weights(tmp_path)[weight], engine.model.state_dict()[weight])


def test_a_state_is_freed_when_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    store, uploading, done = MemoryStore(), threading.Event(), threading.Event()
    artifact = Artifact(store, ArtifactKind.BRANCHES, "law")
    checkpoints = Checkpoints(artifact, next_lease(store, artifact.prefix), Retention(2, None))
    publish = Artifact.publish

    def slow(self: Artifact, *arguments: Any, **named: Any) -> Any:
        uploading.set()
        assert done.wait(30)
        return publish(self, *arguments, **named)

    monkeypatch.setattr(Artifact, "publish", slow)
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
