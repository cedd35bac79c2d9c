"""The canonical training state: a Hugging Face folder with the optimizer's tensors beside it. It uses no pickle.

    config.json, generation_config.json, model*.safetensors    weights, all experts in global order
    optimizer*.safetensors                                     `<parameter>.exp_avg`, `<parameter>.exp_avg_sq`, `step`

One process writes whole tensors. The ranks of a process group write one part of each file (see `checkpoint.tensors`),
with the elements that they update. Readers put the parts together, so any number of processes can load a state.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from bam_ray.blobs import open_store
from bam_ray.checkpoint.model_folder import part_name
from bam_ray.checkpoint.tensors import TensorRange, TensorReader, TensorSpec, encode_part_header
from bam_ray.errors import CheckpointError
from bam_ray.model.loading import stored_names
from bam_ray.training.meta_init import NOISE_WEIGHT
from bam_ray.training.tensor_file import HostCopier, distinct_tensors, specs_of, write_data, write_tensors

OPTIMIZER = "optimizer.safetensors"
ADAM_STATES = ("exp_avg", "exp_avg_sq")
STEP = "step"  # the tensor with the number of updates


class SavableState(Protocol):
    """A training state, or the part of one that a rank writes."""

    @property
    def live(self) -> bool:
        """True if the tensors are the engine's own, which its next step changes."""
        ...

    @property
    def part(self) -> int:
        """The number of the part, from 0."""
        ...

    @property
    def parts(self) -> int:
        """The number of parts of the whole state."""
        ...

    def write(self, folder: Path) -> None:
        """Write the state."""
        ...


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
    part: ClassVar[int] = 0
    parts: ClassVar[int] = 1

    def write(self, folder: Path) -> None:
        """Write the state, which `read_weights` and `read_optimizer` read."""
        self.write_model(folder)
        steps = torch.tensor(self.step)
        specs = [*specs_of({STEP: steps}), *specs_of(self.optimizer)]
        write_tensors(folder / OPTIMIZER, specs, itertools.chain([steps], self.optimizer.values()))

    def write_model(self, folder: Path) -> None:
        """Write only the Hugging Face folder."""
        self.model.save_pretrained(folder, state_dict=dict(self.weights))


@dataclass(frozen=True)
class StatePart:
    """One rank's part of a training state. The parts of all ranks are the whole state.

    Attributes:
        model: The model, only for its configuration and code.
        weights: This rank's ranges of the weights.
        optimizer: This rank's ranges of Adam's states, named as in `TrainingState`.
        step: The number of updates.
        part: The rank.
        parts: The number of ranks.
        live: True if the tensors are the engine's own and change with its next step, False if they are copies in host
            memory.
    """

    model: PreTrainedModel
    weights: Sequence[TensorRange]
    optimizer: Sequence[TensorRange]
    step: int
    part: int
    parts: int
    live: bool

    def write(self, folder: Path) -> None:
        """Write the part; that of rank 0 has the configuration and the number of updates too."""
        optimizer = list(self.optimizer)
        if self.part == 0:
            self.model.save_pretrained(folder, state_dict={})
            optimizer.append(TensorRange(TensorSpec(STEP, torch.int64, ()), 0, torch.tensor([self.step])))
        _write_ranges(folder / part_name("model", self.part, self.parts), self.weights)
        _write_ranges(folder / part_name("optimizer", self.part, self.parts), optimizer)

    def snapshot(self, available_bytes: int) -> "StatePart":
        """Return a copy in host memory if `available_bytes` are enough for it, and otherwise this live part."""
        if sum(each.values.nbytes for each in (*self.weights, *self.optimizer)) > available_bytes:
            return self
        copier = HostCopier()

        def copies(ranges: Iterable[TensorRange]) -> list[TensorRange]:
            return [replace(each, values=copier.copy(each.values)) for each in ranges]

        return replace(self, weights=copies(self.weights), optimizer=copies(self.optimizer), live=False)


def _write_ranges(path: Path, ranges: Sequence[TensorRange]) -> None:
    """Write ranges of tensors to a safetensors file."""
    with path.open("wb") as file:
        file.write(encode_part_header(ranges))
        for each in ranges:
            write_data(file, each.values)


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


def open_tensors(folder: Path, kind: Literal["model", "optimizer"]) -> TensorReader:
    """Return the tensors of the weights or of the optimizer in `folder`, whole or in parts.

    Raises:
        CheckpointError: There are none, or one of the files is damaged.
    """
    store = open_store(str(folder))
    if kind == "model":
        return TensorReader(store)
    return TensorReader(store, files=sorted(path.name for path in folder.glob("optimizer.*safetensors")))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all weights of a Hugging Face folder to the CPU."""
    return _read_all(open_tensors(folder, "model"))


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Read the weights in a Hugging Face folder, which may have another precision, into `model`.

    Raises:
        CheckpointError: A weight is missing or has another shape.
    """
    saved, stored = open_tensors(folder, "model"), stored_names(model)
    for name, tensor in distinct_tensors(model).items():
        spec = saved.specs.get(stored[name])
        if is_saved(spec, name, tensor.shape, folder, is_parameter=isinstance(tensor, Parameter)):
            saved.copy_range(stored[name], 0, tensor.detach().view(-1))


def is_saved(spec: TensorSpec | None, name: str, shape: Sequence[int], folder: Path, is_parameter: bool = True) -> bool:
    """Return True if a weight is in a checkpoint, and False if it need not be: a buffer, or the noise of new gates.

    Args:
        spec: What the checkpoint has for the weight.
        name: The name of the weight in the state dict of its model.
        shape: Its whole shape.
        folder: The folder of the checkpoint.
        is_parameter: False for a buffer.

    Raises:
        CheckpointError: The weight is missing or has another shape.
    """
    if spec is None and (not is_parameter or name.endswith(f".{NOISE_WEIGHT}")):
        return False
    if spec is None or spec.shape != tuple(shape):
        found = "missing" if spec is None else f"{list(spec.shape)}"
        raise CheckpointError(f"{folder}: {name} is {found}: this is the checkpoint of another model")
    return True


def read_optimizer(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Read Adam's states by parameter name (none before the first update), and the number of updates."""
    tensors = _read_all(open_tensors(folder, "optimizer"))
    return tensors, int(tensors.pop(STEP))


def _read_all(reader: TensorReader) -> dict[str, Tensor]:
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in reader.specs.items()}
    for name, tensor in tensors.items():
        reader.copy_range(name, 0, tensor.view(-1))
    return tensors


def read_extended_optimizer(folder: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """Read Adam's states for `model`, whose parameters may have more rows at their end: those rows get zeros."""
    saved, parameters = open_tensors(folder, "optimizer"), dict(model.named_parameters())
    states: dict[str, Tensor] = {}
    for name, spec in saved.specs.items():
        if name != STEP:
            states[name] = torch.zeros(parameters[name.rpartition(".")[0]].shape, dtype=spec.dtype)
            saved.copy_range(name, 0, states[name].view(-1)[: math.prod(spec.shape)])
    return states


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
