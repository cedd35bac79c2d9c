"""One step is the same in any micro batches, and memory decides which."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bam_ray.errors import LossNotFinite, TrainingError
from bam_ray.settings import TrainingSettings
from bam_ray.training.engine import TorchEngine, precision_on
from bam_ray.training.memory import HostMemory, cgroup_room, is_out_of_memory
from bam_ray.training.micro_batch import largest_that_fits
from tests.support import tiny
from tests.support.training_run import LENGTH, SETTINGS, engine

MIB = 1 << 20


def with_micro_batch(size: int | str) -> TrainingSettings:
    return SETTINGS.model_copy(update={"micro_batch_sequences": size})


def holds_at_most(sequences: int, trainer: TorchEngine, error: BaseException | None = None) -> list[int]:
    """Let a model run out of memory above so many sequences; the sizes that it is given."""
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
    ],
    ids=["device", "python", "cpu"],
)
def test_a_step_that_runs_out_of_memory_goes_on_with_half(error: BaseException | None) -> None:
    trainer = engine(settings=with_micro_batch(8))
    sizes = holds_at_most(2, trainer, error)
    result, weights = after_one_step(trainer)
    assert sizes == [8, 4, 2, 2, 2, 2]
    expected, wanted = after_one_step(engine(settings=with_micro_batch(2)))
    assert result == expected
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    trainer.step(tiny.tokens(8, LENGTH), 1e-3)
    assert sizes[6:] == [2, 2, 2, 2], "what did not fit is not tried again"


def test_memory_that_ends_in_the_middle_of_a_step_leaves_nothing_of_it() -> None:
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


def test_a_device_too_small_for_one_sequence_is_said() -> None:
    for size in (4, "auto"):
        trainer = engine(settings=with_micro_batch(size))
        holds_at_most(0, trainer)
        with pytest.raises(TrainingError, match="out of memory with a micro batch of one sequence"):
            trainer.step(tiny.tokens(8, LENGTH), 1e-3)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    trainer = engine(settings=with_micro_batch(4))
    holds_at_most(0, trainer, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        trainer.step(tiny.tokens(8, LENGTH), 1e-3)
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.parametrize(("most", "found"), [(8, 8), (5, 4), (3, 2), (1, 1)])
def test_the_largest_that_fits_is_found(most: int, found: int) -> None:
    trainer = engine(settings=with_micro_batch("auto"))
    holds_at_most(most, trainer)
    result, _ = after_one_step(trainer)
    assert trainer.micro_batch == found
    expected, _ = after_one_step(engine(settings=with_micro_batch(found)))
    assert result == expected, "trials leave something behind"


class FakeMemory:
    """`base` bytes that stay, and so many more a sequence while a trial runs."""

    def __init__(self, base: int, each: int, total: int) -> None:
        self.base, self.each, self.total = base, each, total
        self.most = 0

    def trial(self, size: int) -> None:
        self.most = max(self.most, self.base + size * self.each)
        assert self.most <= self.total, "the kernel would have killed the process"

    def used(self) -> int:
        return self.base

    def peak(self) -> int:
        return self.most

    def reset_peak(self) -> None:
        self.most = self.base

    def room(self) -> int:
        return self.total - self.base


@pytest.mark.parametrize(("total", "found"), [(100 + 15 * 7, 8), (100 + 16 * 7, 16), (100 + 7, 1), (100000, 32)])
def test_a_cpu_is_never_asked_for_more_than_it_has(total: int, found: int) -> None:
    memory = FakeMemory(base=100, each=7, total=total)
    assert largest_that_fits(memory.trial, 32, memory) == found


def test_host_memory_sees_what_a_trial_took() -> None:
    memory = HostMemory()
    memory.reset_peak()
    before = memory.peak()
    block = torch.ones(64 * MIB // 4)
    del block
    assert 60 * MIB < memory.peak() - before < 128 * MIB
    memory.reset_peak()
    assert memory.peak() - before < 30 * MIB


def test_a_task_gets_no_more_of_the_host_than_it_asked_for(tmp_path: Any) -> None:
    used = HostMemory().used()
    assert 0.8 * 100 * MIB < HostMemory(used + 100 * MIB).room() <= 100 * MIB
    assert HostMemory(1).room() == 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert cgroup_room(tmp_path) == []
    (tmp_path / "memory.max").write_text("12\n")
    assert cgroup_room(tmp_path) == [7]


def test_precision_follows_the_device_unless_it_is_fixed() -> None:
    assert precision_on("cpu", "auto") == "fp32"
    assert precision_on("cpu", "bf16") == "bf16"
    assert engine().precision == "fp32"


def test_a_loss_that_is_not_finite_updates_nothing() -> None:
    broken = engine()
    with torch.no_grad():
        broken.model.model.norm.weight[0] = float("nan")
    before = broken.model.lm_head.weight.clone()
    with pytest.raises(LossNotFinite, match=r"the loss \(nan\) or its gradient"):
        broken.step(tiny.tokens(4, LENGTH), 1e-2)
    assert torch.equal(broken.model.lm_head.weight, before)


def test_a_snapshot_is_a_copy_where_there_is_room_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.CONFIGS["mistral"]  # tied
    trainer = TorchEngine(AutoModelForCausalLM.from_config(config), SETTINGS)
    trainer.step(tiny.tokens(4, LENGTH), 1e-3)
    state = trainer.state()
    assert not state.live
    assert state.weights["lm_head.weight"].data_ptr() == state.weights["model.embed_tokens.weight"].data_ptr()
    before = state.weights["model.norm.weight"].clone()
    trainer.step(tiny.tokens(4, LENGTH), 1e-3)
    assert torch.equal(state.weights["model.norm.weight"], before)
    assert not torch.equal(trainer.model.model.norm.weight, before)
    monkeypatch.setattr(HostMemory, "room", lambda self: 1000)
    assert trainer.state().live
