"""The canonical training state: a Hugging Face folder and the optimizer's tensors beside it. No pickle.

    config.json, generation_config.json, model*.safetensors    weights, all experts in global order
    optimizer.safetensors                                       `<parameter>.exp_avg`, `<parameter>.exp_avg_sq`, `step`

It says nothing of ranks, so it loads at any number of processes.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.errors import CheckpointError

OPTIMIZER = "optimizer.safetensors"
ADAM_STATES = ("exp_avg", "exp_avg_sq")


def write_state(
    folder: Path, model: PreTrainedModel, weights: dict[str, Tensor], optimizer: dict[str, Tensor], step: int
) -> None:
    """Write weights (all of them, global order) and Adam's states by parameter name, with the number of updates."""
    model.save_pretrained(folder, state_dict=weights)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in optimizer.items()}
    save_file({**tensors, "step": torch.tensor(step)}, folder / OPTIMIZER)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a Hugging Face folder, on the CPU."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights.update(load_file(path))
    if not weights:
        raise CheckpointError(f"{folder} has no model*.safetensors")
    return weights


def read_optimizer(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Adam's states by parameter name, and the number of updates."""
    with safe_open(folder / OPTIMIZER, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return tensors, int(tensors.pop("step"))
