"""Training states that are divided into parts, as the ranks of a process group write them."""

from collections.abc import Mapping

from torch import Tensor

from bam_ray.checkpoint.tensors import TensorRange, TensorSpec
from bam_ray.training.state import StatePart, TrainingState


def ranges_of(tensors: Mapping[str, Tensor], part: int, parts: int) -> list[TensorRange]:
    """Return one of `parts` ranges of each tensor; small tensors have fewer ranges."""
    found = []
    for name, tensor in tensors.items():
        start, stop = (tensor.numel() * each // parts for each in (part, part + 1))
        if start < stop:
            spec = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
            found.append(TensorRange(spec, start, tensor.flatten()[start:stop]))
    return found


def part_of(state: TrainingState, part: int, parts: int) -> StatePart:
    """Return one of `parts` parts of a state."""
    return StatePart(
        state.model,
        ranges_of(state.weights, part, parts),
        ranges_of(state.optimizer, part, parts),
        state.step,
        part,
        parts,
        state.live,
    )
