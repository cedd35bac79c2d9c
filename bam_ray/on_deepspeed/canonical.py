"""Convert DeepSpeed's state to and from the canonical form (`training.state`), which is independent of ranks.

Weights are fp32 and equal ZeRO's partitioned master weights. Weights and Adam's states are gathered parameter by
parameter: each is whole on all ranks for a moment, and then stays only on rank 0. They are read from files in the same
way, so that no rank except rank 0 ever holds more of the model than its own part and one parameter.

DeepSpeed's native checkpoints are not used. They are pickles, they resume only at the same number of ranks, and they
would omit experts that are not of DeepSpeed's own classes.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from bam_ray.checkpoint.tensors import TensorSpec
from bam_ray.errors import CheckpointError
from bam_ray.on_deepspeed.expert_parallel import ExpertShards
from bam_ray.training.memory import Memory
from bam_ray.training.meta_init import NOISE_WEIGHT
from bam_ray.training.state import ADAM_STATES, OPTIMIZER, TensorFiles, TrainingState, spill_optimizer
from bam_ray.training.tensor_file import HostCopier


def state(
    model: PreTrainedModel, zero: Any, shards: ExpertShards, host: Memory, only_weights: bool = False
) -> TrainingState | None:
    """Return the state of `model` and its ZeRO optimizer on rank 0 and None on the others. A collective.

    If `host`, rank 0's host memory, has space for all of it, the state is a copy. Otherwise, or with `only_weights`,
    the state is live: rank 0 holds only what it must gather, and writes Adam's states to a file while it gathers them.
    """
    first = dist.get_rank() == 0
    step = steps(zero)
    specs = _optimizer_specs(model, shards) if step and not only_weights else []
    size = _weight_bytes(model, shards) + sum(spec.bytes for spec in specs)
    is_copy = first and not only_weights and size <= host.available_bytes()
    copier = HostCopier()
    weights = _gather_weights(model, shards, first, copier, is_copy)
    states = _gathered_optimizer_states(model, zero, shards) if specs else iter(())
    if not first:
        for _ in states:  # every rank takes part in the collectives
            pass
        return None
    if is_copy or not specs:
        optimizer = {spec.name: copier.to_host(state) for spec, state in zip(specs, states, strict=True)}
        return TrainingState(model, weights, optimizer, step, live=not is_copy)
    return TrainingState(model, weights, {}, step, live=True, optimizer_file=spill_optimizer(specs, states, step))


def _gather_weights(
    model: PreTrainedModel, shards: ExpertShards, first: bool, copier: HostCopier, is_copy: bool
) -> dict[str, Tensor]:
    """Return the whole weights by name on rank 0, as copies or where they are, and nothing on the others. A collective.

    Sharded experts are in host memory in any case, because rank 0's device has no space for those of all ranks. Names
    that share a parameter (tied weights) share its copy.
    """
    gathered: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            with GatheredParameters([tensor] if is_partitioned(tensor) else []):
                whole = shards.gather(name, tensor.detach())
                if first and is_partitioned(tensor):
                    whole = copier.copy(whole)
            if first and name in shards.names:
                whole = copier.to_host(whole)  # on a CPU it is a copy already, because it was gathered
            elif first and is_copy and not is_partitioned(tensor):
                whole = copier.copy(whole)
            gathered[id(tensor)] = whole if first else tensor
        if first:
            weights[name] = gathered[id(tensor)]
    return weights


def _gathered_optimizer_states(model: PreTrainedModel, zero: Any, shards: ExpertShards) -> Iterator[Tensor]:
    """Yield Adam's states in the order of `_optimizer_specs`; each is a tensor of its own. A collective."""
    _link_states(zero)
    for name, parameter in _trained_parameters(model):
        for kind in ADAM_STATES:
            yield shards.gather(name, safe_get_full_optimizer_state(parameter, kind))


def _optimizer_specs(model: PreTrainedModel, shards: ExpertShards) -> list[TensorSpec]:
    """Return the names, dtypes and shapes of Adam's states of the whole model."""
    return [
        TensorSpec(f"{name}.{kind}", torch.float32, shards.whole_shape(name, shape_of(parameter)))
        for name, parameter in _trained_parameters(model)
        for kind in ADAM_STATES
    ]


def _weight_bytes(model: PreTrainedModel, shards: ExpertShards) -> int:
    """Return the bytes of the whole model; tied weights count once."""
    tensors = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    return sum(
        math.prod(shards.whole_shape(name, shape_of(tensor))) * tensor.element_size()
        for name, tensor in tensors.values()
    )


def load_weights(folder: Path, model: PreTrainedModel, shards: ExpertShards) -> None:
    """Read this rank's part of the weights in a Hugging Face folder, which may have another precision.

    Raises `CheckpointError` if the folder contains another model.
    """
    weights = TensorFiles(sorted(folder.glob("model*.safetensors")))
    for name, parameter in model.named_parameters():
        whole = weights.get(name)
        if whole is None and name.endswith(f".{NOISE_WEIGHT}"):
            continue
        if whole is None or shards.shard(name, whole).shape != shape_of(parameter):
            found = "missing" if whole is None else f"{list(whole.shape)}"
            raise CheckpointError(f"{folder}: {name} is {found}: this is the checkpoint of another model")
        with GatheredParameters([parameter] if is_partitioned(parameter) else [], modifier_rank=0):
            if not is_partitioned(parameter) or dist.get_rank() == 0:
                parameter.data.copy_(shards.shard(name, whole))
    for name, buffer in model.named_buffers():
        if name in weights:  # other buffers are computed from the configuration
            buffer.copy_(weights[name])


def load(folder: Path, model: PreTrainedModel, zero: Any, shards: ExpertShards) -> None:
    """Read a state, which any number of ranks may have written, into `model` and its ZeRO optimizer.

    Raises `CheckpointError` if the folder contains another model.
    """
    load_weights(folder, model, shards)
    zero.refresh_fp32_params()
    zero.optimizer.state.clear()
    states = TensorFiles([folder / OPTIMIZER])
    step = int(states["step"])
    if not step:
        return
    for partition in master_weights(zero):
        zero.optimizer.state[partition] = {
            "step": torch.tensor(float(step), device=partition.device),
            **{kind: torch.zeros_like(partition) for kind in ADAM_STATES},
        }
    _link_states(zero)
    for name, parameter in _trained_parameters(model):
        for kind in ADAM_STATES:
            mine = shards.shard(name, states[f"{name}.{kind}"])
            if is_partitioned(parameter):
                safe_set_local_optimizer_state(parameter, _part(mine, parameter), kind)
            else:
                safe_set_full_optimizer_state(parameter, mine.to(parameter.device), kind)


def is_partitioned(tensor: Tensor) -> bool:
    """Return True if `tensor` is a parameter that ZeRO-3 partitions over the ranks."""
    return hasattr(tensor, "ds_id")


def shape_of(parameter: Any) -> torch.Size:
    """Return the shape of a whole parameter, without the experts of other ranks."""
    shape: torch.Size = parameter.ds_shape if is_partitioned(parameter) else parameter.shape
    return shape


def _part(whole: Tensor, parameter: Any) -> Tensor:
    """Return this rank's part of a parameter's state.

    As in ZeRO-3, all parts have the same length, and the last is padded with zeros.
    """
    size = parameter.ds_tensor.numel()
    padded = F.pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
    return padded[size * dist.get_rank() :][:size]


def master_weights(zero: Any) -> Iterable[Tensor]:
    """Return the master weights, which ZeRO's inner optimizer updates on this rank."""
    stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    masters: Iterable[Tensor] = zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
    return masters


def _trained_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Parameter]]:
    """Return the parameters for which the optimizer has states."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


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
