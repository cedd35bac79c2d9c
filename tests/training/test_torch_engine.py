"""One step gives the same result with any micro batch, and the memory determines the micro batch."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bam_ray.blobs import open_store
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import CheckpointError, LossNotFinite, TrainingError
from bam_ray.settings import TrainingSettings
from bam_ray.training.devices import resolve_precision
from bam_ray.training.engine import EngineSpec
from bam_ray.training.memory import HostMemory, cgroup_available_bytes, is_out_of_memory, limit_in_bytes
from bam_ray.training.micro_batch import find_largest_micro_batch
from bam_ray.training.torch_engine import TorchEngine
from bam_ray.units import MIB
from tests.support import tiny
from tests.support.training_run import LENGTH, SETTINGS, engine


def with_micro_batch(size: int | str) -> TrainingSettings:
    return SETTINGS.model_copy(update={"micro_batch_sequences": size})


def limit_memory(sequences: int, trainer: TorchEngine, error: BaseException | None = None) -> list[int]:
    """Make a model run out of memory with more than `sequences`; the returned list records the sizes of its calls."""
    sizes: list[int] = []

    def forward(module: object, inputs: object, named: dict[str, Any]) -> None:
        sizes.append(len(named["input_ids"]))
        if sizes[-1] > sequences:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.model.base_model.register_forward_pre_hook(forward, with_kwargs=True)
    return sizes


def after_one_step(trainer: TorchEngine) -> tuple[Any, dict[str, torch.Tensor]]:
    result = trainer.step(tiny.tokens(8, LENGTH), 1e-3)
    return result, trainer.model.state_dict()


@pytest.mark.parametrize("size", [1, 3, 5])
def test_uneven_micro_batches_give_the_same_step(size: int) -> None:
    result, weights = after_one_step(engine(settings=with_micro_batch(8)))
    other, others = after_one_step(engine(settings=with_micro_batch(size)))
    assert other.nll == pytest.approx(result.nll, rel=1e-6)
    assert other.grad_norm == pytest.approx(result.grad_norm, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-4, msg=name)  # Adam's first step: signs


@pytest.mark.parametrize(
    "error",
    [
        None,
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        dist.DistBackendError("NCCL error in: NCCLUtils.cpp:77, unhandled cuda error: 'out of memory'"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=["device", "python", "cpu", "cuda", "cublas", "cudnn", "nccl", "system"],
)
def test_a_step_that_runs_out_of_memory_halves_the_micro_batch(error: BaseException | None) -> None:
    trainer = engine(settings=with_micro_batch(8))
    sizes = limit_memory(2, trainer, error)
    result, weights = after_one_step(trainer)
    assert sizes == [8, 4, 2, 2, 2, 2]
    expected, wanted = after_one_step(engine(settings=with_micro_batch(2)))
    assert result == expected
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    trainer.step(tiny.tokens(8, LENGTH), 1e-3)
    assert sizes[6:] == [2, 2, 2, 2], "a size that did not fit is tried again"


def test_a_step_starts_again_if_memory_runs_out_halfway() -> None:
    trainer = engine(settings=with_micro_batch(2))
    calls = []

    def forward(module: object, inputs: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError

    trainer.model.base_model.register_forward_pre_hook(forward)
    result, weights = after_one_step(trainer)
    expected, wanted = after_one_step(engine(settings=with_micro_batch(1)))
    assert result == expected
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_a_device_too_small_for_one_sequence_is_reported() -> None:
    for size in (4, "auto"):
        trainer = engine(settings=with_micro_batch(size))
        limit_memory(0, trainer)
        with pytest.raises(TrainingError, match="out of memory with a micro batch of one sequence"):
            trainer.step(tiny.tokens(8, LENGTH), 1e-3)


def test_other_errors_are_not_taken_for_out_of_memory() -> None:
    trainer = engine(settings=with_micro_batch(4))
    limit_memory(0, trainer, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        trainer.step(tiny.tokens(8, LENGTH), 1e-3)
    assert not is_out_of_memory(ValueError("can't allocate memory"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))


def test_an_update_that_runs_out_of_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = engine(settings=with_micro_batch(4))

    def update() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trainer.optimizer, "step", update)
    with pytest.raises(TrainingError, match=r"out of memory in the update of the weights \(.* GiB in use, .* free\)"):
        trainer.step(tiny.tokens(8, LENGTH), 1e-3)


@pytest.mark.parametrize(("most", "found"), [(8, 8), (5, 4), (3, 2), (1, 1)])
def test_the_largest_micro_batch_that_fits_is_found(most: int, found: int) -> None:
    trainer = engine(settings=with_micro_batch("auto"))
    limit_memory(most, trainer)
    result, _ = after_one_step(trainer)
    assert trainer.micro_batch == found
    expected, _ = after_one_step(engine(settings=with_micro_batch(found)))
    assert result == expected, "the trials changed the step"


class FakeMemory:
    """A memory with `base` bytes in use, and `each` more bytes per sequence while a trial runs."""

    def __init__(self, base: int, each: int, total: int) -> None:
        self.base, self.each, self.total = base, each, total
        self.most = 0

    def trial(self, size: int) -> None:
        self.most = max(self.most, self.base + size * self.each)
        assert self.most <= self.total, "the kernel would have killed the process"

    def used_bytes(self) -> int:
        return self.base

    def peak_bytes(self) -> int:
        return self.most

    def reset_peak(self) -> None:
        self.most = self.base

    def available_bytes(self) -> int:
        return self.total - self.base


@pytest.mark.parametrize(("total", "found"), [(100 + 15 * 7, 8), (100 + 16 * 7, 16), (100 + 7, 1), (100000, 32)])
def test_trials_never_exceed_the_memory_of_a_cpu(total: int, found: int) -> None:
    memory = FakeMemory(base=100, each=7, total=total)
    assert find_largest_micro_batch(memory.trial, 32, memory) == found


def test_host_memory_measures_the_peak_of_a_trial() -> None:
    memory = HostMemory()
    memory.reset_peak()
    before = memory.peak_bytes()
    block = torch.ones(64 * MIB // 4)
    del block
    assert 60 * MIB < memory.peak_bytes() - before < 128 * MIB
    memory.reset_peak()
    assert memory.peak_bytes() - before < 30 * MIB


def test_a_task_gets_no_more_host_memory_than_it_requested(tmp_path: Any) -> None:
    used = HostMemory().used_bytes()
    assert 0.8 * 100 * MIB < HostMemory(used + 100 * MIB).available_bytes() <= 100 * MIB
    assert HostMemory(1).available_bytes() == 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert cgroup_available_bytes(tmp_path) == []
    (tmp_path / "memory.max").write_text("12\n")
    assert cgroup_available_bytes(tmp_path) == [7]


def test_auto_precision_depends_on_the_device() -> None:
    assert resolve_precision("cpu", "auto") == "fp32"
    assert resolve_precision("cpu", "bf16") == "bf16"
    assert engine().precision == "fp32"


def test_a_non_finite_loss_updates_nothing() -> None:
    broken = engine()
    with torch.no_grad():
        broken.model.model.norm.weight[0] = float("nan")
    before = broken.model.lm_head.weight.clone()
    with pytest.raises(LossNotFinite, match=r"the loss \(nan\) or its gradient"):
        broken.step(tiny.tokens(4, LENGTH), 1e-2)
    assert torch.equal(broken.model.lm_head.weight, before)


def test_a_state_is_a_copy_if_the_host_has_memory_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.CONFIGS["mistral"]  # tied
    trainer = TorchEngine(EngineSpec(AutoModelForCausalLM.from_config(config), SETTINGS))
    trainer.step(tiny.tokens(4, LENGTH), 1e-3)
    state = trainer.state()
    assert not state.live
    assert state.weights["lm_head.weight"].data_ptr() == state.weights["model.embed_tokens.weight"].data_ptr()
    before = state.weights["model.norm.weight"].clone()
    trainer.step(tiny.tokens(4, LENGTH), 1e-3)
    assert torch.equal(state.weights["model.norm.weight"], before)
    assert not torch.equal(trainer.model.model.norm.weight, before)
    monkeypatch.setattr(HostMemory, "available_bytes", lambda self: 1000)
    assert trainer.state().live


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_every_family_resumes_all_its_weights(family: str, tmp_path: Path) -> None:
    """Transformers stores some weights under other names."""
    trained, again = (TorchEngine(EngineSpec(tiny.dense(family, seed), SETTINGS)) for seed in (0, 1))
    trained.step(tiny.tokens(4, LENGTH), 1e-3)
    state = trained.state()
    assert state is not None
    state.write(tmp_path)
    again.load(tmp_path)
    assert again.updates == 1
    weights = trained.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.model.state_dict().items())
    specs, _ = trained.whole_weights()
    assert {spec.name for spec in specs} == {*TensorReader(open_store(str(tmp_path))).specs}
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if name.endswith(".weight") and "layers.0" in name)]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is missing: this is the checkpoint of another model"):
        again.load(tmp_path)


def limited_engine(limit: int | None) -> TorchEngine:
    """Return an engine with a memory limit in bytes, whose model allocates 40 MiB per sequence in a forward pass."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.CONFIGS["cohere"])

    def allocate(module: object, inputs: object, named: dict[str, Any]) -> None:
        torch.ones(len(named["input_ids"]) * 40 * MIB // 4)  # large enough that malloc always maps and unmaps it

    model.base_model.register_forward_pre_hook(allocate, with_kwargs=True)
    return TorchEngine(EngineSpec(model, with_micro_batch("auto"), memory_limit=limit))


def test_the_memory_limit_bounds_micro_batch_and_checkpoint_copy() -> None:
    limited, unlimited = limited_engine(limit_in_bytes(1e-6)), limited_engine(limit_in_bytes(0.0))
    results = [trainer.step(tiny.tokens(8, LENGTH), 1e-3) for trainer in (limited, unlimited)]
    assert (limited.micro_batch, unlimited.micro_batch) == (1, 8)
    assert results[0].nll == pytest.approx(results[1].nll, rel=1e-6)
    assert (limited.state().live, unlimited.state().live) == (True, False)
