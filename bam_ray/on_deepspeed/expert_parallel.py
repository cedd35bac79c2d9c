"""Expert parallelism, applied to a whole mixture from outside: each rank keeps its own experts only.

In a group of E ranks with N experts, rank r keeps the n = N / E experts r·n to (r + 1)·n - 1 of every layer, in the FFN
and in the attention, and the tables of these experts at the input and at the output. Neighboring ranks form a group.
Ranks that hold the same experts in different groups average their gradients. Everything else (averaged embeddings,
norms, routers, the counts of a prior) is replicated on all ranks and plain data-parallel.

kv_shared has one k_proj and one v_proj for all experts. They are replicated: each rank computes keys and values of all
gathered tokens, but only the queries of its own experts read them, so its gradient is the part of the sum of the ranks'
losses that went through its experts. The parts of a group add up to the gradient of the group's summed loss, and
data-parallel averaging sums them over all groups and divides by the number of ranks, which is the gradient of the mean
loss. So k_proj and v_proj are ordinary replicated parameters, without a factor.

Shapes: E ranks of a group, N experts of a layer, n experts on each rank, B batch, L length, d hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bam_ray.errors import TrainingError
from bam_ray.model.attention_bam import BamAttention, BamAttentionExperts
from bam_ray.model.embeddings_bam import BamHead, BamInputEmbeddings, BamTables
from bam_ray.model.experts_bam import BamExperts
from bam_ray.model.modeling_bam import BamModel, attention_masks
from bam_ray.on_deepspeed.collectives import EPGroup, all_gather
from bam_ray.on_deepspeed.dispatch import AllGatherAttentionExchange, AllToAllTokenDispatcher
from bam_ray.on_deepspeed.table_exchange import AllToAllTableExchange
from bam_ray.settings import divisors
from bam_ray.training.devices import COLLECTIVE_TIMEOUT


@dataclass(frozen=True)
class ExpertShards:
    """The parameters that are sharded over the ranks of a group, by expert."""

    ep_group: EPGroup | None = None  # None: every rank holds all experts
    group_name: str = ""  # DeepSpeed's name of the process group
    names: frozenset[str] = frozenset()

    def first_element(self, name: str, elements: int) -> int:
        """Return the position of the first of this rank's `elements` in the whole of a parameter."""
        if self.ep_group is None or name not in self.names:
            return 0
        return self.ep_group.rank * elements

    def replica(self, name: str, rank: int, ranks: int) -> tuple[int, int]:
        """Return the number of this rank among those that hold the same elements of a tensor, and their count."""
        if self.ep_group is None or name not in self.names:
            return rank, ranks
        return rank // self.ep_group.size, ranks // self.ep_group.size

    def gather(self, name: str, shard: Tensor) -> Tensor:
        """Return the whole of a parameter of which every rank has a shard: [n, ...] -> [N, ...].

        A replicated parameter is returned unchanged. A collective for sharded parameters: call it on all ranks.
        """
        if self.ep_group is None or name not in self.names:
            return shard
        return all_gather(shard, self.ep_group.process_group)

    def whole_shape(self, name: str, shard: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the whole of a parameter of which every rank has a shard of the shape `shard`."""
        if self.ep_group is None or name not in self.names:
            return tuple(shard)
        return (shard[0] * self.ep_group.size, *shard[1:])


def apply_expert_parallelism(model: nn.Module, size: int) -> ExpertShards:
    """Reduce a `BamForCausalLM` to this rank's experts, in groups of `size` ranks.

    The model must be whole and equal on all ranks, or on the meta device: then each rank reads its own shard
    afterwards. Call it on all ranks, before an optimizer takes the parameters. A model without experts is left
    unchanged, and so is any model if `size` is 1.

    Raises:
        TrainingError: If the number of experts or of ranks is not divisible by `size`.
    """
    config: Any = model.config
    experts = getattr(config, "num_experts", None)
    if experts is None or size == 1:
        return ExpertShards()
    ranks = dist.get_world_size()
    if experts % size or ranks % size:
        raise TrainingError(
            f"expert_parallel is {size}, which does not divide the {experts} experts and the {ranks} processes: "
            f"use one of {divisors(math.gcd(experts, ranks))}"
        )
    groups._create_expert_and_data_parallel(size)  # private, but ZeRO finds no groups that were made another way
    group_name = f"ep_size_{size}"
    process_group: ProcessGroup = groups._get_expert_parallel_group(group_name)
    # In a parallel block the collectives of the attention overlap with those of the FFN.
    side_group = dist.new_subgroups(size, timeout=COLLECTIVE_TIMEOUT)[0] if config.parallel_block else process_group
    ep_group = EPGroup(process_group, side_group)
    _replace_seams(model, ep_group)
    names = []
    shards: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters share a shard
    for path, module in model.named_modules():
        for name in _sharded_parameters(module):
            whole: nn.Parameter = getattr(module, name)
            if whole not in shards:
                shards[whole] = _shard_of(whole, ep_group, group_name)
            setattr(module, name, shards[whole])
            names.append(f"{path}.{name}")
    return ExpertShards(ep_group, group_name, frozenset(names))


def _replace_seams(model: nn.Module, ep_group: EPGroup) -> None:
    """Let the dispatchers and exchanges of all modules reach the experts of all ranks of a group."""
    config: Any = model.config
    inner: Any = model.model
    dispatcher = AllToAllTokenDispatcher(ep_group, config.num_experts)
    exchange = AllGatherAttentionExchange(ep_group)
    tables = AllToAllTableExchange(ep_group, config.vocab_size)
    gather_positions = _GatherPositions(inner, ep_group.process_group)
    for module in model.modules():
        if isinstance(module, BamExperts):
            module.dispatcher = dispatcher
        elif isinstance(module, BamInputEmbeddings | BamHead):
            module.exchange = tables
        elif isinstance(module, BamAttention):
            module.exchange = exchange
            module.register_forward_pre_hook(gather_positions, with_kwargs=True)
            if module.attention_experts.kv_shared:  # the query heads of fewer experts share each key/value head
                module.attention_experts.backend.num_key_value_groups //= ep_group.size


def _sharded_parameters(module: nn.Module) -> list[str]:
    """Return the names of the parameters that `module` itself holds and that have one slice for each expert."""
    if not isinstance(module, BamExperts | BamAttentionExperts | BamTables):
        return []
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if isinstance(module, BamAttentionExperts) and module.kv_shared:
        return [name for name in names if name[0] not in "kv"]
    return names


def _shard_of(whole: nn.Parameter, ep_group: EPGroup, group_name: str) -> nn.Parameter:
    """Return this rank's shard [n, ...] of a parameter [N, ...]."""
    shard = nn.Parameter(whole.detach().chunk(ep_group.size)[ep_group.rank].clone())
    # ZeRO reads these two attributes and averages the gradient over the ranks with the same experts only.
    shard.allreduce, shard.group_name = False, group_name  # type: ignore[attr-defined] # tensors accept attributes
    return shard


class _GatherPositions:
    """Forward pre-hook of attentions that replaces positions and masks by those of all gathered sequences.

    If all sequences have the same positions, they also have the same masks (causal, sliding windows), and one row of
    them is enough. Otherwise positions are gathered, once in a forward pass, and the masks are computed from them on
    every rank: a rank cannot know whether the sequences of other ranks need masks (for documents that end within a
    sequence).
    """

    def __init__(self, model: BamModel, process_group: ProcessGroup) -> None:
        self._rotary, self._config, self._process_group = model.rotary_emb, model.config, process_group
        self._local: Tensor | None = None  # positions of the current forward pass; what follows belongs to them
        self._embeddings: tuple[Tensor, Tensor]
        self._masks: dict[str, Tensor | None]

    def __call__(
        self, module: BamAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions, mask, x = kwargs["position_ids"], kwargs["attention_mask"], args[0]
        assert kwargs["cache"] is None, "expert-parallel attention has no cache: generate from a saved checkpoint"
        if positions.shape[0] < x.shape[0]:  # [1, L]: the same positions for all sequences
            if mask is None:
                return args, kwargs
            assert bool((mask == mask[:1]).all()), "expert-parallel attention does not support padding: omit the mask"
            return args, {**kwargs, "attention_mask": mask[:1]}
        if positions is not self._local:
            self._local = positions
            gathered = all_gather(positions, self._process_group)  # [B, L] -> [E·B, L]
            self._embeddings = self._rotary(kwargs["position_embeddings"][0], gathered)
            self._masks = attention_masks(self._config, x.new_empty(*gathered.shape, 0), gathered)
        kind = self._config.layer_types[module.attention_experts.layer_idx]
        return args, {
            **kwargs,
            "position_embeddings": self._embeddings,
            "attention_mask": self._masks[kind],
            "position_ids": None,
        }


class _ExpertMarker(MoE):
    """A module that makes DeepSpeed treat the model as one with experts; it has no parameters and is never called.

    `deepspeed.DeepSpeedEngine` looks for instances of `MoE` in its `__init__`, where it also builds the ZeRO optimizer.
    So an attribute that is set afterwards comes too late, and DeepSpeed has no setting for it. Without the marker, ZeRO
    would average the gradients of expert parameters over all ranks, as if all ranks held the same experts.
    """

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)  # MoE's own would build DeepSpeed's layer
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing: DeepSpeed calls this to make groups, which `apply_expert_parallelism` has made already."""


@contextmanager
def expert_marker(model: nn.Module, shards: ExpertShards) -> Iterator[None]:
    """Mark the model as one with experts for `deepspeed.initialize`, if experts are sharded and trained.

    The marker is removed at the end, so that the model and its state dict stay unchanged.
    """
    if not any(parameter.requires_grad for name, parameter in model.named_parameters() if name in shards.names):
        yield
        return
    config: Any = model.config
    model.add_module("deepspeed_marker", _ExpertMarker(config.num_experts))
    try:
        yield
    finally:
        del model.deepspeed_marker
