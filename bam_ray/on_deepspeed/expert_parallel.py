"""Expert parallelism, applied to a whole mixture from outside: each rank keeps its experts and forgets the others.

Rank r of a group of E keeps the experts r·n to (r + 1)·n - 1 of every layer, in the FFN and in the attention.
Neighbouring ranks form a group; ranks that hold the same experts in different groups average their gradients.
Everything else (embeddings, norms, routers) is whole on all ranks and plain data-parallel.

kv_shared has one k_proj and v_proj for all experts. They stay whole: each rank computes K and V of all gathered tokens,
but only its own experts' queries read them, so its gradient is the part of Σ_ranks loss that went through its experts.
The parts of a group sum to the gradient of the group's summed loss; data-parallel averaging sums them over all groups
and divides by the number of ranks, which is the gradient of the mean loss. So they are ordinary replicated parameters,
with no factor.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bam_ray.errors import TrainingError
from bam_ray.model.attention_bam import BamAttentionExperts
from bam_ray.model.experts_bam import BamExperts
from bam_ray.model.modeling_bam import BamModel, masks_of
from bam_ray.on_deepspeed.dispatch import AllToAllDispatcher, AttentionExchange, Wire, gathered
from bam_ray.settings import divisors


@dataclass(frozen=True)
class ExpertShards:
    """Which parameters hold this rank's experts alone, and how they become whole again."""

    wire: Wire | None = None  # that tokens take to the experts; None: all experts are here
    group_name: str = ""  # DeepSpeed's
    names: frozenset[str] = frozenset()

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks that share the experts; None: all experts are here."""
        return self.wire.group if self.wire else None

    def mine(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a parameter, or of a state of it: [N, ...] -> [n, ...]; a replicated one as it is."""
        if self.group is None or name not in self.names:
            return whole
        return whole.chunk(self.group.size())[self.group.rank()]

    def whole(self, name: str, mine: Tensor) -> Tensor:
        """The inverse: [n, ...] -> [N, ...]. A collective for sharded parameters: call it on all ranks."""
        if self.group is None or name not in self.names:
            return mine
        return gathered(mine, self.group)


def apply_expert_parallelism(model: nn.Module, size: int) -> ExpertShards:
    """Cut a `BamForCausalLM`, whole and equal on all ranks, down to this rank's experts, in groups of `size` ranks.

    An outline (`training.outline`) as well, of which it then has only this rank's part to read.

    Call it on all ranks, before an optimizer takes the parameters. Raises `TrainingError` where experts or ranks are
    not divisible by `size`. A model without experts, or `size` 1, is left as it is.
    """
    config: Any = model.config
    experts = getattr(config, "num_experts", None)
    if experts is None or size == 1:
        return ExpertShards()
    if experts % size or dist.get_world_size() % size:
        ranks = dist.get_world_size()
        raise TrainingError(
            f"expert_parallel is {size}, which does not divide the {experts} experts and the {ranks} processes: "
            f"use one of {divisors(math.gcd(experts, ranks))}"
        )
    groups._create_expert_and_data_parallel(size)  # does nothing where they exist
    group_name = f"ep_size_{size}"
    group: ProcessGroup = groups._get_expert_parallel_group(group_name)
    inner: Any = model.model
    # In a parallel block, what attention gathers and sums is under way beside what the FFN exchanges
    wire = Wire(group, dist.new_subgroups(size)[0] if config.parallel_block else None)
    exchange = AttentionExchange(wire)
    dispatcher = AllToAllDispatcher(wire, meanwhile=exchange.attend)
    positions = _Positions(inner, group)
    names = []
    for path, module in model.named_modules():
        if isinstance(module, BamExperts):
            module.dispatcher = dispatcher
            own = [name for name, _ in module.named_parameters(recurse=False)]
        elif isinstance(module, BamAttentionExperts):
            module.exchange = exchange
            inner.layers[module.layer_idx].arrived = exchange.arrived
            module.register_forward_pre_hook(positions, with_kwargs=True)
            own = [name for name, _ in module.named_parameters(recurse=False)]
            if module.kv_shared:  # of query heads here, which all read the one set of key/value heads
                module.num_key_value_groups //= size
                own = [name for name in own if name[0] not in "kv"]
        else:
            continue
        for name in own:
            whole: nn.Parameter = getattr(module, name)
            mine = nn.Parameter(whole.detach().chunk(size)[group.rank()].clone())
            mine.allreduce, mine.group_name = False, group_name  # type: ignore[attr-defined] # read by ZeRO
            setattr(module, name, mine)
            names.append(f"{path}.{name}")
    return ExpertShards(wire, group_name, frozenset(names))


class _Positions:
    """Forward pre-hook of attention experts: gives them positions and masks of all sequences that come to them.

    Where positions are the same for every sequence, so are masks (causal, sliding windows), and one row of them is
    enough. Else positions travel, once a forward pass, and masks are made of them here: whether there is any to make
    (documents that end within a sequence) may differ between ranks.
    """

    def __init__(self, model: BamModel, group: ProcessGroup) -> None:
        self._rotary, self._config, self._group = model.rotary_emb, model.config, group
        self._mine: Tensor | None = None  # the last positions seen, and what was made of all ranks' together
        self._embeddings: tuple[Tensor, Tensor]
        self._masks: dict[str, Tensor | None]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mine, mask, x = kwargs["position_ids"], kwargs["attention_mask"], args[0]
        assert kwargs["cache"] is None, "expert-parallel attention has no cache: generate from a saved checkpoint"
        if mine.shape[0] < x.shape[0]:
            if mask is None:
                return args, kwargs
            assert bool((mask == mask[:1]).all()), "expert-parallel attention knows no padding: leave out the mask"
            return args, {**kwargs, "attention_mask": mask[:1]}
        if mine is not self._mine:
            self._mine = mine
            everyones = gathered(mine, self._group)
            self._embeddings = self._rotary(kwargs["position_embeddings"][0], everyones)
            self._masks = masks_of(self._config, x.new_empty(*everyones.shape, 0), everyones)
        kind = self._config.layer_types[module.layer_idx]
        return args, {
            **kwargs,
            "position_embeddings": self._embeddings,
            "attention_mask": self._masks[kind],
            "position_ids": None,
        }


class _ExpertMarker(MoE):
    """Tells DeepSpeed that the model has experts; it has no parameters and is never called.

    `deepspeed.DeepSpeedEngine` finds out by looking for instances of `MoE` in its `__init__`, where it also builds the
    ZeRO optimizer: too early for an attribute set afterwards, and there is no setting. Without it ZeRO would average
    expert parameters over all ranks, as if all held the same experts.
    """

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)  # not MoE's, which would build DeepSpeed's own layer
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed to make groups: `apply_expert_parallelism` has made them."""


@contextmanager
def announced_experts(model: nn.Module, shards: ExpertShards) -> Iterator[None]:
    """Let `deepspeed.initialize` see that the model has experts to train; leaves no trace in the model."""
    if not any(parameter.requires_grad for name, parameter in model.named_parameters() if name in shards.names):
        yield
        return
    config: Any = model.config
    model.add_module("deepspeed_marker", _ExpertMarker(config.num_experts))
    try:
        yield
    finally:
        del model.deepspeed_marker
