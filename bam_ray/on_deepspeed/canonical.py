"""Convert DeepSpeed's state to and from the canonical form (`training.state`), which is independent of ranks.

Weights are fp32 and equal ZeRO's partitioned master weights. Each rank saves the elements that it updates: those of its
partitions, of the weights and of Adam's states. So no tensor is gathered, and saving is no collective. Elements that
nothing updates are divided equally among the ranks that hold them. All of these are ranges of consecutive elements of
whole tensors, so every rank reads the ranges that it needs from the parts of any number of ranks.

DeepSpeed's native checkpoints are not used. They are pickles, they resume only at the same number of ranks, and they
would omit experts that are not of DeepSpeed's own classes.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_local_optimizer_state
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.checkpoint.tensors import TensorRange, TensorSpec
from bam_ray.model.loading import stored_names
from bam_ray.on_deepspeed.expert_parallel import ExpertShards
from bam_ray.training.state import ADAM_STATES, STEP, StatePart, is_saved, open_tensors
from bam_ray.training.tensor_file import distinct_tensors


def state(model: PreTrainedModel, zero: Any, shards: ExpertShards) -> StatePart:
    """Return this rank's part of the state of `model` and its ZeRO optimizer, which is live."""
    step = steps(zero)
    if step:
        _link_states(zero)
    weights, optimizer = [], []
    stored = stored_names(model)
    for name, tensor in distinct_tensors(model).items():
        first, values = _own_range(name, tensor, shards)
        if not values.numel():
            continue
        shape = shards.whole_shape(name, shape_of(tensor))
        weights.append(TensorRange(TensorSpec(stored[name], values.dtype, shape), first, values))
        if step and tensor.requires_grad:
            for kind in ADAM_STATES:
                adam = _adam_state(tensor, kind)[: values.numel()]
                optimizer.append(TensorRange(TensorSpec(f"{name}.{kind}", adam.dtype, shape), first, adam))
    return StatePart(model, weights, optimizer, step, dist.get_rank(), dist.get_world_size(), live=True)


def _own_range(name: str, tensor: Any, shards: ExpertShards) -> tuple[int, Tensor]:
    """Return the elements of a tensor that this rank saves, and the position of the first one in the whole tensor."""
    rank = dist.get_rank()
    if is_partitioned(tensor):
        size = tensor.ds_tensor.numel()  # all partitions have the same length: the last ones are padded
        return rank * size, tensor.ds_tensor.detach()[: max(0, tensor.ds_numel - rank * size)]
    flat = tensor.detach().reshape(-1)
    if not hasattr(tensor, "_hp_mapping"):  # nothing updates it
        replica, replicas = shards.replica(name, rank, dist.get_world_size())
        start, stop = (flat.numel() * each // replicas for each in (replica, replica + 1))
    elif tensor._hp_mapping is None:
        start = stop = 0
    else:
        partition = tensor._hp_mapping.lp_fragment_address
        start, stop = partition.start, partition.start + partition.numel
    return shards.first_element(name, flat.numel()) + start, flat[start:stop]


def _adam_state(parameter: Any, kind: str) -> Tensor:
    """Return one of Adam's states of the elements of `parameter` that this rank updates; ZeRO-3 pads its end."""
    found: Tensor = (
        safe_get_local_optimizer_state(parameter, kind)
        if is_partitioned(parameter)
        else parameter._hp_mapping.get_optim_state_fragment(kind)
    )
    return found


def whole_weights(model: PreTrainedModel, shards: ExpertShards) -> tuple[list[TensorSpec], Iterator[Tensor]]:
    """Return the names, dtypes and shapes of all weights, and their values, which are gathered one by one.

    Iterating over the values is a collective.
    """
    tensors, stored = distinct_tensors(model), stored_names(model)
    specs = [
        TensorSpec(stored[name], tensor.dtype, shards.whole_shape(name, shape_of(tensor)))
        for name, tensor in tensors.items()
    ]

    def gathered() -> Iterator[Tensor]:
        for name, tensor in tensors.items():
            with GatheredParameters([tensor] if is_partitioned(tensor) else []):
                yield shards.gather(name, tensor.detach())

    return specs, gathered()


def load_weights(folder: Path, model: PreTrainedModel, shards: ExpertShards) -> None:
    """Read this rank's part of the weights in a Hugging Face folder, which may have another precision.

    Raises `CheckpointError` if the folder contains another model.
    """
    saved, stored = open_tensors(folder, "model"), stored_names(model)
    for name, parameter in model.named_parameters():
        shape = shards.whole_shape(name, shape_of(parameter))
        if not is_saved(saved.specs.get(stored[name]), name, shape, folder):
            continue
        with GatheredParameters([parameter] if is_partitioned(parameter) else [], modifier_rank=0):
            if not is_partitioned(parameter) or dist.get_rank() == 0:
                mine = parameter.data.view(-1)
                saved.copy_range(stored[name], shards.first_element(name, mine.numel()), mine)
    for name, buffer in model.named_buffers():
        if stored.get(name) in saved.specs:  # other buffers are computed from the configuration
            buffer.copy_(saved.read(stored[name]))


def load(folder: Path, model: PreTrainedModel, zero: Any, shards: ExpertShards) -> None:
    """Read a state, which any number of ranks may have written, into `model` and its ZeRO optimizer.

    Raises `CheckpointError` if the folder contains another model.
    """
    load_weights(folder, model, shards)
    zero.refresh_fp32_params()
    zero.optimizer.state.clear()
    saved = open_tensors(folder, "optimizer")
    step = int(saved.read(STEP))
    if not step:
        return
    for partition in master_weights(zero):
        zero.optimizer.state[partition] = {
            "step": torch.tensor(float(step), device=partition.device),
            **{kind: torch.zeros_like(partition) for kind in ADAM_STATES},
        }
    _link_states(zero)
    for name, parameter in model.named_parameters():
        first, values = _own_range(name, parameter, shards)
        if parameter.requires_grad and values.numel():
            for kind in ADAM_STATES:
                saved.copy_range(f"{name}.{kind}", first, _adam_state(parameter, kind)[: values.numel()])


def is_partitioned(tensor: Tensor) -> bool:
    """Return True if `tensor` is a parameter that ZeRO-3 partitions over the ranks."""
    return hasattr(tensor, "ds_id")


def shape_of(parameter: Any) -> torch.Size:
    """Return the shape of a whole parameter, without the experts of other ranks."""
    shape: torch.Size = parameter.ds_shape if is_partitioned(parameter) else parameter.shape
    return shape


def master_weights(zero: Any) -> Iterable[Tensor]:
    """Return the master weights, which ZeRO's inner optimizer updates on this rank."""
    stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    masters: Iterable[Tensor] = zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
    return masters


def steps(zero: Any) -> int:
    """Return the number of updates so far."""
    return max((int(state["step"]) for state in zero.optimizer.state.values()), default=0)


def _link_states(zero: Any) -> None:
    """Link Adam's states again, so that DeepSpeed's accessors for stages 1 and 2 find all of them.

    DeepSpeed 0.19.8 links them only once, after the first update of the first parameter group. The other parameter
    groups have no states then, so the states of the experts would be missing.
    """
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
