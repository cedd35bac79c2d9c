"""The canonical training state: a Hugging Face folder with the optimizer's tensors beside it. It uses no pickle.

    config.json, generation_config.json, model*.safetensors    weights, all experts in global order
    optimizer.safetensors                                      `<parameter>.exp_avg`, `<parameter>.exp_avg_sq`, `step`

The state contains nothing about ranks, so any number of processes can load it.
"""

import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.checkpoint.scratch import new_scratch_folder, remove_scratch_folder
from bam_ray.checkpoint.tensors import TensorSpec
from bam_ray.errors import CheckpointError, TrainingError
from bam_ray.training.tensor_file import HostCopier, specs_of, write_tensors

OPTIMIZER = "optimizer.safetensors"
ADAM_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingState:
    """All weights in global order, and Adam's states by parameter name, after `step` updates.

    If `live`, the tensors are the engine's own and change with its next step. Otherwise they are copies in host memory.
    """

    model: PreTrainedModel  # only for its configuration and code
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    step: int
    live: bool
    optimizer_file: Path | None = None  # Adam's states, in place of `optimizer`, if the host had no memory for them

    def write(self, folder: Path) -> None:
        """Write the state, which `read_weights` and `read_optimizer` read."""
        self.write_model(folder)
        if self.optimizer_file is not None:
            shutil.move(self.optimizer_file, folder / OPTIMIZER)
            remove_scratch_folder(self.optimizer_file.parent)
        else:
            write_optimizer(folder / OPTIMIZER, specs_of(self.optimizer), self.optimizer.values(), self.step)

    def write_model(self, folder: Path) -> None:
        """Write only the Hugging Face folder."""
        self.model.save_pretrained(folder, state_dict=dict(self.weights))


def write_optimizer(path: Path, specs: Iterable[TensorSpec], states: Iterable[Tensor], step: int) -> None:
    """Write Adam's states after `step` updates; only one of them is in host memory at a time."""
    steps = torch.tensor(step)
    write_tensors(path, [*specs_of({"step": steps}), *specs], itertools.chain([steps], states))


def spill_optimizer(specs: Iterable[TensorSpec], states: Iterable[Tensor], step: int) -> Path:
    """Write Adam's states to a file in a scratch folder of its own, and return its path.

    Raises:
        TrainingError: The file cannot be written.
    """
    try:
        path = new_scratch_folder("optimizer") / OPTIMIZER
        write_optimizer(path, specs, states, step)
    except OSError as error:
        raise TrainingError(
            f"no checkpoint can be written to {tempfile.gettempdir()}: {error}; free space there or set TMPDIR"
        ) from error
    return path


def snapshot(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    step: int,
    available_bytes: int,
) -> TrainingState:
    """Return the state at this moment.

    The tensors are copied if the host has `available_bytes` for that, so that training can continue at once. Otherwise
    the state is live.
    """
    size = sum(tensor.nbytes for tensors in (weights, optimizer) for tensor in tensors.values())
    if size > available_bytes:
        return TrainingState(model, weights, optimizer, step, live=True)
    copier = HostCopier()
    return TrainingState(model, _copies(weights, copier), _copies(optimizer, copier), step, live=False)


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of safetensors files, by name; each tensor is read when it is requested."""

    def __init__(self, paths: Sequence[Path]) -> None:
        files: list[Any] = [safe_open(path, framework="pt") for path in paths]
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all weights of a Hugging Face folder to the CPU."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights.update(load_file(path))
    if not weights:
        raise CheckpointError(f"{folder} has no model*.safetensors: use the folder of a saved model")
    return weights


def read_optimizer(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Read Adam's states by parameter name (none before the first update), and the number of updates."""
    with safe_open(folder / OPTIMIZER, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return tensors, int(tensors.pop("step"))


def resize_optimizer_state(states: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return Adam's states for `model`, whose parameters may have more rows at their end: those rows get zeros."""
    parameters = dict(model.named_parameters())

    def padded(state: Tensor, length: int) -> Tensor:
        missing = length - state.shape[0]
        return torch.cat([state, state.new_zeros(missing, *state.shape[1:])]) if missing else state

    return {name: padded(state, len(parameters[name.rpartition(".")[0]])) for name, state in states.items()}


def _copies(tensors: Mapping[str, Tensor], copier: HostCopier) -> dict[str, Tensor]:
    """Return copies in host memory. Names that share a tensor (tied weights) share its copy."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in copies:
            copies[key] = copier.copy(tensor)
        named[name] = copies[key]
    return named
