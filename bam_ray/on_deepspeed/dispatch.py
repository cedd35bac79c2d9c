"""The expert-parallel implementations of the model's two seams: tokens travel to experts on other ranks and back.

FFN experts are sparse, so a token travels only to the experts that it chose: an all-to-all with uneven sizes and
without padding. Attention experts are soft (every token uses every expert), so all tokens travel to all ranks: an
all-gather along the batch, the weighted outputs of the local experts, and a reduce-scatter that sums them. Tokens
travel in the dtype of the experts' matrix products.

In a parallel block the two branches overlap: each computes while the other communicates (`BamDecoderLayer.forward`).
Time runs from left to right, and ┄ is communication:

    attention    start ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ compute ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ wait
    FFN                route, dispatch ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ experts, combine ┄┄┄┄┄┄

    pending = exchange.start(x, gates, attend)                     # start the all-gather
    rows, counts, metadata = dispatcher.dispatch(                  # start the all-to-all
        x, index, weights, overlap=pending.compute                 # wait for the all-gather, attend, start the sum
    )                                                              # wait for the all-to-all
    out = dispatcher.combine(compute(rows, counts), metadata, x)   # apply the experts, then all-to-all
    attended = pending.wait()                                      # wait for the sum

The backward pass runs this from right to left, because autograd runs the operation that was recorded last first.

The gradient of each collective is the reverse collective, with SUM: the ranks of a group then hold the gradients of the
sum of their losses. ZeRO divides every gradient by the number of all ranks, which makes them those of the mean loss.

Shapes: E ranks of the group, N experts of a layer, n = N / E experts on each rank, T tokens, k experts a token, R rows,
B batch, L length, d hidden size.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bam_ray.model.attention_exchange_bam import Attend, PendingAttention
from bam_ray.model.token_dispatch_bam import LocalDispatchMetadata, LocalTokenDispatcher, Overlap, to_autocast_dtype
from bam_ray.on_deepspeed.collectives import (
    AsyncCollective,
    EPGroup,
    StartCollective,
    start_all_gather,
    start_all_to_all,
    start_reduce_scatter,
)


class AllToAllMetadata(NamedTuple):
    """The data of a dispatch that `AllToAllTokenDispatcher.combine` needs to reverse it."""

    local: LocalDispatchMetadata
    sent: list[int]  # [E] number of rows that were sent to each rank
    received: list[int]  # [E] number of rows that were received from each rank
    order: Tensor  # [R'] permutation that sorted the received rows by expert


class AllToAllTokenDispatcher:
    """The token dispatcher of a group in which rank r has the experts r·n to (r + 1)·n - 1.

    Every rank must dispatch and combine equally often, in the forward and in the backward pass, with any number of
    rows: experts and ranks that receive no tokens take part with zero rows. It keeps no state, so layers can share it.
    """

    def __init__(self, ep_group: EPGroup, num_experts: int) -> None:
        self.ep_group = ep_group
        self.local = LocalTokenDispatcher(num_experts)

    def dispatch(
        self,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        kept: Tensor | None = None,
        overlap: Overlap | None = None,
    ) -> tuple[Tensor, Tensor, AllToAllMetadata]:
        """See `TokenDispatcher.dispatch`. `overlap` is called after the rows were sent."""
        rows, counts, local = self.local.dispatch(x, top_k_index, top_k_weights, kept)
        outgoing = counts.view(self.ep_group.size, -1)  # [E, n] rows for each expert of each rank
        incoming = torch.empty_like(outgoing)  # [E, n] rows from each rank for each expert of this rank
        with self.ep_group.timer.measure(rows.device):
            dist.all_to_all_single(incoming, outgoing, group=self.ep_group.process_group)
        sent, received = torch.stack((outgoing.sum(1), incoming.sum(1))).tolist()  # one wait for the GPU
        collective = self._all_to_all(sent, received)
        rows = collective.start(rows)
        if overlap is not None:
            overlap()
        # Rows arrive sorted by rank, then by expert; an expert needs its rows of all ranks together.
        expert = torch.arange(incoming.shape[1], device=rows.device).repeat(incoming.shape[0])  # [E·n]
        order = expert.repeat_interleave(incoming.flatten()).argsort(stable=True)  # [R']
        rows = collective.wait(rows).index_select(0, order)  # [R', d]
        return rows, incoming.sum(0), AllToAllMetadata(local, sent, received, order)

    def combine(self, rows: Tensor, metadata: AllToAllMetadata, x: Tensor) -> Tensor:
        """See `TokenDispatcher.combine`."""
        collective = self._all_to_all(sent=metadata.received, received=metadata.sent)
        rows = rows.index_select(0, metadata.order.argsort())  # [R', d], sorted by rank again
        return self.local.combine(collective.wait(collective.start(rows)), metadata.local, x)

    def _all_to_all(self, sent: list[int], received: list[int]) -> AsyncCollective:
        group = self.ep_group.process_group
        forward = partial(start_all_to_all, sent=sent, received=received, group=group)
        backward = partial(start_all_to_all, sent=received, received=sent, group=group)
        return AsyncCollective(self.ep_group.timer, forward, backward)


class AllGatherAttentionExchange:
    """The attention exchange of a group in which rank r has the experts r·n to (r + 1)·n - 1.

    All ranks must bring the same shape [B, L]. Positions and masks take another route (`expert_parallel`). It keeps no
    state, so layers can share it.
    """

    def __init__(self, ep_group: EPGroup) -> None:
        self.ep_group = ep_group

    def start(self, x: Tensor, gates: Tensor, attend: Attend) -> PendingAttention:
        """See `AttentionExchange.start`. `attend` is called with the tokens [E·B, L, d] and gates [E·B, L, n]."""
        return GatheredAttention(self.ep_group, x, gates, attend)


class GatheredAttention(PendingAttention):
    """The attention of the tokens [B, L, d] of this rank by the experts of all ranks."""

    def __init__(self, ep_group: EPGroup, x: Tensor, gates: Tensor, attend: Attend) -> None:
        super().__init__()
        gather: StartCollective = partial(start_all_gather, group=ep_group.side_group)
        scatter: StartCollective = partial(start_reduce_scatter, group=ep_group.side_group)
        self._ep_group, self._attend = ep_group, attend
        self._gather_x = AsyncCollective(ep_group.timer, gather, scatter)
        self._gather_gates = AsyncCollective(ep_group.timer, gather, scatter)
        self._sum = AsyncCollective(ep_group.timer, scatter, gather)
        self._x = self._gather_x.start(to_autocast_dtype(x))  # [E·B, L, d]
        self._gates = self._gather_gates.start(gates)  # [E·B, L, N]
        self._out: Tensor  # [B, L, d]

    def _compute(self) -> None:
        x = self._gather_x.wait(self._x)
        gates = self._gather_gates.wait(self._gates)
        local_gates = gates.chunk(self._ep_group.size, dim=-1)[self._ep_group.rank]  # [E·B, L, n]
        self._out = self._sum.start(self._attend(x, local_gates))

    def _wait(self) -> Tensor:
        return self._sum.wait(self._out)
