"""Tokens to experts on other ranks and back: the expert-parallel sides of the model's two seams.

FFN experts are sparse, so only the tokens that chose one travel to it: an uneven all-to-all, dropless, no padding.
Attention experts are soft (every token meets every expert), so all tokens travel to all: an all-gather along the batch,
the local experts' weighted outputs, and a reduce-scatter that sums them.

Each collective's gradient is the reverse collective, with SUM: the ranks of the group then hold gradients of the sum of
their losses. ZeRO divides every gradient by the number of all ranks, which makes them those of the mean loss.

Shapes: E ranks of the group, n = N / E experts on each, T tokens, k experts a token, B batch, L length, d hidden.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from bam_ray.model.experts_bam import LocalDispatcher

Compute = Callable[[Tensor, Tensor], Tensor]


def gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, ...] of each rank -> [E·B, ...], in the order of ranks."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def scattered_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """[E·B, ...] of each rank -> this rank's [B, ...] of their sum."""
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def exchanged(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """Send the first sent[0] rows to rank 0, and so on -> received[0] rows of rank 0, and so on."""
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class Wire:
    """The way that tokens take between the ranks of a group, and how long they are on it."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def busy(self, device: torch.device) -> Iterator[None]:
        """Tokens are on their way; on a GPU, once it comes to that."""
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        """Since this was last asked; what ranks wait for one another is in it. Waits for the GPU."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds: float = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        with wire.busy(x.device):
            return gathered(x, wire.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with ctx.wire.busy(grads[0].device):
            return scattered_sum(grads[0], ctx.wire.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        with wire.busy(x.device):
            return scattered_sum(x, wire.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with ctx.wire.busy(grads[0].device):
            return gathered(grads[0], ctx.wire.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], wire: Wire) -> Tensor:
        ctx.sent, ctx.received, ctx.wire = sent, received, wire
        with wire.busy(rows.device):
            return exchanged(rows, sent, received, wire.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        with ctx.wire.busy(grads[0].device):
            return exchanged(grads[0], ctx.received, ctx.sent, ctx.wire.group), None, None, None


class AllToAllDispatcher:
    """Tokens to the experts they chose and back, rank r of the group having the experts r·n to (r + 1)·n - 1.

    Sorting tokens by expert, weighing and combining are `LocalDispatcher`'s: only "apply each expert to its rows" goes
    through the group. Every rank must call it equally often, in the forward and in the backward pass, with any number
    of tokens: experts or ranks that get none take part with zero rows.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.local = LocalDispatcher()

    def __call__(
        self,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        num_experts: int,
        compute: Compute,
        kept: Tensor | None = None,
    ) -> Tensor:
        """hidden [T, d], index and weights [T, k] -> Σ_k weight · expert(hidden): [T, d].

        `compute(rows [R, d], counts [n])` applies each local expert to its consecutive rows. Choices that are not
        `kept` [T, k] (None: all are) do not travel.
        """
        return self.local(hidden, index, weights, num_experts, partial(self.apply, compute), kept)

    def apply(self, compute: Compute, rows: Tensor, counts: Tensor) -> Tensor:
        """Apply expert i of all N to its counts[i] rows, wherever it is: rows [R, d] sorted by expert -> [R, d]."""
        outgoing = counts.view(self.wire.group.size(), -1)  # [E, n]: to rank, its expert
        incoming = torch.empty_like(outgoing)  # [E, n]: from rank, my expert
        with self.wire.busy(rows.device):
            dist.all_to_all_single(incoming, outgoing, group=self.wire.group)
        sent, received = outgoing.sum(1).tolist(), incoming.sum(1).tolist()
        rows = _Exchange.apply(rows, sent, received, self.wire)  # type: ignore[no-untyped-call]
        # They come sorted by rank, then expert; an expert wants its rows of all ranks together.
        expert = torch.arange(incoming.shape[1], device=rows.device).repeat(incoming.shape[0])
        order = expert.repeat_interleave(incoming.flatten()).argsort(stable=True)
        rows = compute(rows.index_select(0, order), incoming.sum(0))
        rows = rows.index_select(0, order.argsort())
        back: Tensor = _Exchange.apply(rows, received, sent, self.wire)  # type: ignore[no-untyped-call]
        return back


class AttentionExchange:
    """Every token to every attention expert: rank r of the group has the experts r·n to (r + 1)·n - 1.

    All ranks bring the same shape [B, L]; positions and masks come another way (`expert_parallel`).
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def __call__(self, x: Tensor, gates: Tensor, attend: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x [B, L, d], gates [B, L, N] -> Σ_i gate_i · Attention_i(x): [B, L, d].

        `attend(x [E·B, L, d], gates [E·B, L, n])` is the weighted sum over the local experts.
        """
        x = _Gather.apply(x, self.wire)  # type: ignore[no-untyped-call]
        gates = _Gather.apply(gates, self.wire)  # type: ignore[no-untyped-call]
        group = self.wire.group
        mine = gates.chunk(group.size(), dim=-1)[group.rank()]
        out: Tensor = _ScatterSum.apply(attend(x, mine), self.wire)  # type: ignore[no-untyped-call]
        return out
