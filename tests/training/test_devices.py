"""The device follows the request of a task, and the precision follows the device."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from bam_ray.errors import TrainingError
from bam_ray.training.devices import inference_dtype, requested_device
from bam_ray.training.engine import EngineSpec
from bam_ray.training.torch_engine import TorchEngine
from tests.support import tiny
from tests.support.training_run import SETTINGS


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch say that there is a GPU that computes in bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.fixture(autouse=True)
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_was_not_requested_is_not_used() -> None:
    assert requested_device(0.0) == "cpu"
    assert requested_device(0.5) == requested_device(1.0) == "cuda"
    trainer = TorchEngine(EngineSpec(AutoModelForCausalLM.from_config(tiny.CONFIGS["cohere"]), SETTINGS))
    assert (trainer.device, trainer.precision, trainer.model.device.type) == ("cpu", "fp32", "cpu")


def test_a_requested_gpu_that_is_missing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert requested_device(0.0) == "cpu"
    with pytest.raises(TrainingError, match=r"the task requests a GPU, but torch .* finds none on this node: install"):
        requested_device(1.0)


@pytest.mark.usefixtures("gpu")
def test_models_are_evaluated_and_served_in_bf16_on_gpus() -> None:
    assert inference_dtype("cuda", "auto") is torch.bfloat16
    assert inference_dtype("cpu", "auto") is torch.float32
    assert inference_dtype("cpu", "bf16") is torch.bfloat16
    assert torch.get_float32_matmul_precision() == "highest"
    assert inference_dtype("cuda", "fp32") is torch.float32
    assert torch.get_float32_matmul_precision() == "high", "TF32"


def test_old_gpus_compute_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert inference_dtype("cuda", "auto") is torch.float32
