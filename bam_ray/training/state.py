"""The canonical training state: a Hugging Face folder and the optimizer's tensors beside it. No pickle.

    config.json, generation_config.json, model*.safetensors    weights, all experts in global order
    optimizer.safetensors                                       `<parameter>.exp_avg`, `<parameter>.exp_avg_sq`, `step`

It says nothing of ranks, so it loads at any number of processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.errors import CheckpointError

OPTIMIZER = "optimizer.safetensors"
ADAM_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class State:
    """Weights (all of them, global order) and Adam's states by parameter name, after `step` updates.

    `live`: the tensors are the engine's own, and change with its next step. Else they are copies in host memory.
    """

    model: PreTrainedModel  # for its configuration and code alone
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    step: int
    live: bool

    def write(self, folder: Path) -> None:
        """Write all of it, to be read by `read_weights` and `read_optimizer`."""
        self.write_model(folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.optimizer.items()}
        save_file({**tensors, "step": torch.tensor(self.step)}, folder / OPTIMIZER)

    def write_model(self, folder: Path) -> None:
        """Write the Hugging Face folder alone."""
        self.model.save_pretrained(folder, state_dict=dict(self.weights))


def snapshot(
    model: PreTrainedModel, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], step: int, room: int
) -> State:
    """The state at this moment: copied, so that training can go on at once, where the host has `room` for that."""
    size = sum(tensor.nbytes for tensors in (weights, optimizer) for tensor in tensors.values())
    if size > room:
        return State(model, weights, optimizer, step, live=True)
    return State(model, _copies(weights), _copies(optimizer), step, live=False)


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        files: list[Any] = [safe_open(path, framework="pt") for path in paths]
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a Hugging Face folder, on the CPU."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights.update(load_file(path))
    if not weights:
        raise CheckpointError(f"{folder} has no model*.safetensors")
    return weights


def read_optimizer(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Adam's states by parameter name (none before the first update), and the number of updates."""
    with safe_open(folder / OPTIMIZER, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return tensors, int(tensors.pop("step"))


def grown(states: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Adam's states for `model`, whose parameters may have got rows at their end since: those rows' are zero."""
    parameters = dict(model.named_parameters())

    def filled(state: Tensor, length: int) -> Tensor:
        missing = length - state.shape[0]
        return torch.cat([state, state.new_zeros(missing, *state.shape[1:])]) if missing else state

    return {name: filled(state, len(parameters[name.rpartition(".")[0]])) for name, state in states.items()}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory. Tensors that are one (tied weights) stay one."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in copies:
            copies[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(
                tensor.detach(), non_blocking=True
            )
        named[name] = copies[key]
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return named
