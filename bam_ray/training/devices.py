"""Properties of the device that a model is trained on: its name, precision, random number generator and timeout."""

from datetime import timedelta
from typing import Literal

import torch
from torch import Tensor

from bam_ray.errors import TrainingError

Precision = Literal["fp32", "bf16"]

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Time that a rank waits for the others in a collective of training, in every process group. It includes the first
collective, before which each node downloads the model. (torch's default for groups on NCCL is 10 minutes.)"""


def requested_device(gpus: float) -> str:
    """Return the device of a task that requested `gpus` GPUs; a task that requested none computes on the CPU.

    Raises `TrainingError` if the task requested a GPU and torch finds none.
    """
    if not gpus:
        return "cpu"
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise TrainingError(
            f"the task requests a GPU, but torch {torch.__version__} ({build}) finds none on this node: install a "
            "torch that fits the driver (nvidia-smi shows it), or set needs.gpus to 0"
        )
    return "cuda"


def resolve_precision(device: str, precision: Literal["fp32", "bf16", "auto"]) -> Precision:
    """Return `precision`, or for `auto` bf16 on a GPU that computes in bf16 and fp32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def inference_dtype(device: str, precision: Literal["fp32", "bf16", "auto"]) -> torch.dtype:
    """Return the dtype in which a model is evaluated or served; see `resolve_precision`.

    For fp32 on a GPU, matrix products of this process are set to TF32: without it they would not use tensor cores.
    """
    if resolve_precision(device, precision) == "bf16":
        return torch.bfloat16
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    return torch.float32


def device_name(device: str) -> str:
    """Return the name of a device for people, for example `NVIDIA H100 80GB HBM3` or `cpu`."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def random_state(device: str) -> Tensor:
    """Return the state of the random number generator of `device`."""
    return torch.cuda.get_rng_state(device) if device.startswith("cuda") else torch.get_rng_state()


def set_random_state(device: str, state: Tensor) -> None:
    """Restore a state that `random_state` returned."""
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
