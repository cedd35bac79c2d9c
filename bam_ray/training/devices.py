"""Properties of the device that a model is trained on: its name, its precision and its random number generator."""

from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16"]


def resolve_precision(device: str, precision: Literal["fp32", "bf16", "auto"]) -> Precision:
    """Return `precision`, or for `auto` bf16 on a GPU that computes in bf16 and fp32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


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
