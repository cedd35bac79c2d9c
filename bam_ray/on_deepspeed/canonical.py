"""DeepSpeed's state to and from the canonical form (`training.state`), which says nothing of ranks.

Weights are fp32 and equal to ZeRO's partitioned masters. Parameter by parameter they and Adam's states become whole on
all ranks for a moment, and stay on rank 0 alone; they are read from files that way too, so that no rank but rank 0 ever
holds more of the model than its own part and one parameter. DeepSpeed's native checkpoints are pickles, resume only at
the same number of ranks, and would leave out experts that are not of its own classes: they are not used.
"""

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

from bam_ray.errors import CheckpointError
from bam_ray.on_deepspeed.expert_parallel import ExpertShards
from bam_ray.training.memory import HostMemory
from bam_ray.training.meta_init import NOISE
from bam_ray.training.state import ADAM_STATES, OPTIMIZER, State, TensorFiles, snapshot


def state(model: PreTrainedModel, zero: Any, shards: ExpertShards) -> State | None:
    """The state of `model` and its ZeRO optimizer on rank 0, None elsewhere; called on all ranks."""
    first = dist.get_rank() == 0
    weights: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # of parameters that were gathered: tied ones are one
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not is_partitioned(tensor):
            whole = shards.gather(name, tensor.detach())
            if first and name in shards.names:  # one after the other, not all on rank 0's device
                whole = whole.cpu()
        elif id(tensor) in names:
            whole = weights.get(names[id(tensor)], tensor)
        else:
            with GatheredParameters([tensor]):
                whole = tensor.detach().to("cpu", copy=True)
            names[id(tensor)] = name
        if first:
            weights[name] = whole
    step = steps(zero)
    states: dict[str, Tensor] = {}
    if step:
        _link_states(zero)
        for name, parameter in trained(model):
            for kind in ADAM_STATES:
                whole = shards.gather(name, safe_get_full_optimizer_state(parameter, kind))
                if first:
                    states[f"{name}.{kind}"] = whole.cpu()
    return snapshot(model, weights, states, step, HostMemory().room()) if first else None


def fill(folder: Path, model: PreTrainedModel, shards: ExpertShards) -> None:
    """Read this rank's part of the weights in a Hugging Face folder, which may be in another precision.

    Raises `CheckpointError` where the folder holds another model.
    """
    weights = TensorFiles(sorted(folder.glob("model*.safetensors")))
    for name, parameter in model.named_parameters():
        whole = weights.get(name)
        if whole is None and name.endswith(f".{NOISE}"):
            continue
        if whole is None or shards.shard(name, whole).shape != shape_of(parameter):
            found = "missing" if whole is None else f"{list(whole.shape)}"
            raise CheckpointError(f"{folder}: {name} is {found}: it is the checkpoint of another model")
        with GatheredParameters([parameter] if is_partitioned(parameter) else [], modifier_rank=0):
            if not is_partitioned(parameter) or dist.get_rank() == 0:
                parameter.data.copy_(shards.shard(name, whole))
    for name, buffer in model.named_buffers():
        if name in weights:  # those that are no function of the configuration
            buffer.copy_(weights[name])


def load(folder: Path, model: PreTrainedModel, zero: Any, shards: ExpertShards) -> None:
    """Read a state into `model` and its ZeRO optimizer, whatever the number of ranks that wrote it.

    Raises `CheckpointError` where the folder holds another model.
    """
    fill(folder, model, shards)
    zero.refresh_fp32_params()
    zero.optimizer.state.clear()
    states = TensorFiles([folder / OPTIMIZER])
    step = int(states["step"])
    if not step:
        return
    for partition in _masters(zero):
        zero.optimizer.state[partition] = {
            "step": torch.tensor(float(step), device=partition.device),
            **{kind: torch.zeros_like(partition) for kind in ADAM_STATES},
        }
    _link_states(zero)
    for name, parameter in trained(model):
        for kind in ADAM_STATES:
            mine = shards.shard(name, states[f"{name}.{kind}"])
            if is_partitioned(parameter):
                safe_set_local_optimizer_state(parameter, _part(mine, parameter), kind)
            else:
                safe_set_full_optimizer_state(parameter, mine.to(parameter.device), kind)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether it is a parameter of which ZeRO-3 keeps a part on each rank."""
    return hasattr(tensor, "ds_id")


def shape_of(parameter: Any) -> torch.Size:
    """The shape of a parameter as the model has it, whole (but for experts on other ranks)."""
    shape: torch.Size = parameter.ds_shape if is_partitioned(parameter) else parameter.shape
    return shape


def _part(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a parameter's state, as ZeRO-3 cuts it: all of one length, the last filled up with zeros."""
    size = parameter.ds_tensor.numel()
    padded = F.pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
    return padded[size * dist.get_rank() :][:size]


def _masters(zero: Any) -> Iterable[Tensor]:
    """What ZeRO's own optimizer updates on this rank."""
    stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    masters: Iterable[Tensor] = zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
    return masters


def trained(model: PreTrainedModel) -> Iterator[tuple[str, Parameter]]:
    """The parameters that the optimizer has states of."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def steps(zero: Any) -> int:
    """Updates made so far."""
    return max((int(state["step"]) for state in zero.optimizer.state.values()), default=0)


def _link_states(zero: Any) -> None:
    """Let the accessors of DeepSpeed's stages 1 and 2 find Adam's states.

    DeepSpeed 0.19.8 links them once, after the first parameter group's first update, when the other groups have none:
    those of the experts would be missing.
    """
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
