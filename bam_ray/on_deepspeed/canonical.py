"""DeepSpeed's state to and from the canonical form (`training.state`), which says nothing of ranks.

Weights are fp32 on every rank, equal to ZeRO's partitioned masters, and Adam's states are read and set parameter by
parameter through DeepSpeed's own accessors. DeepSpeed's native checkpoints are pickles, resume only at the same number
of ranks, and would leave out experts that are not of its own classes: they are not used.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from bam_ray.errors import CheckpointError
from bam_ray.on_deepspeed.expert_parallel import ExpertShards
from bam_ray.training.memory import HostMemory
from bam_ray.training.state import ADAM_STATES, State, read_optimizer, read_weights, snapshot


def state(model: PreTrainedModel, zero: Any, shards: ExpertShards) -> State | None:
    """The state of `model` and its ZeRO optimizer on rank 0, None elsewhere; called on all ranks."""
    first = dist.get_rank() == 0
    weights: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = shards.whole(name, tensor)
        if first:
            weights[name] = whole
    step = steps(zero)
    if step:
        _link_states(zero)
        for name, parameter in trained(model):
            for kind in ADAM_STATES:
                whole = shards.whole(name, safe_get_full_optimizer_state(parameter, kind))
                if first:
                    states[f"{name}.{kind}"] = whole.cpu()
    return snapshot(model, weights, states, step, HostMemory().room()) if first else None


def load(folder: Path, model: PreTrainedModel, zero: Any, shards: ExpertShards) -> None:
    """Read a state into `model` and its ZeRO optimizer, whatever the number of ranks that wrote it.

    Raises `CheckpointError` where the folder holds another model.
    """
    weights = read_weights(folder)
    states, step = read_optimizer(folder)
    for name, parameter in model.named_parameters():
        whole = weights.get(name)
        if whole is None or shards.mine(name, whole).shape != parameter.shape:
            found = "missing" if whole is None else f"{list(whole.shape)}"
            raise CheckpointError(f"{folder}: {name} is {found}: it is the checkpoint of another model")
        parameter.data.copy_(shards.mine(name, whole))
    for name, buffer in model.named_buffers():
        if name in weights:  # those that are no function of the configuration
            buffer.copy_(weights[name])
    zero.refresh_fp32_params()
    zero.optimizer.state.clear()
    if not step:
        return
    for partition in zero.single_partition_of_fp32_groups:
        zero.optimizer.state[partition] = {
            "step": torch.tensor(float(step), device=partition.device),
            **{kind: torch.zeros_like(partition) for kind in ADAM_STATES},
        }
    _link_states(zero)
    for name, parameter in trained(model):
        for kind in ADAM_STATES:
            whole = states[f"{name}.{kind}"].to(parameter.device)
            safe_set_full_optimizer_state(parameter, shards.mine(name, whole), kind)


def trained(model: PreTrainedModel) -> Iterator[tuple[str, Parameter]]:
    """The parameters that the optimizer has states of."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def steps(zero: Any) -> int:
    """Updates made so far."""
    return max((int(state["step"]) for state in zero.optimizer.state.values()), default=0)


def _link_states(zero: Any) -> None:
    """Let DeepSpeed's accessors find Adam's states.

    DeepSpeed 0.19.8 links them once, after the first parameter group's first update, when the other groups have none:
    those of the experts would be missing.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
