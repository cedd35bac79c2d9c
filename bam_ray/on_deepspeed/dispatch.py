"""Tokens to experts on other ranks and back: the expert-parallel sides of the model's two seams.

FFN experts are sparse, so only the tokens that chose one travel to it: an uneven all-to-all, no padding.
Attention experts are soft (every token meets every expert), so all tokens travel to all: an all-gather along the batch,
the local experts' weighted outputs, and a reduce-scatter that sums them. Tokens travel in the precision that experts
compute in.

In a parallel block the two take turns (`Flight`): what one computes runs beside what is under way for the other.

    attention   gather ┄┄┄┄┄┄┄┄┄┄ attend, sum ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄
    FFN               route, rows there ┄┄┄┄┄┄ experts, rows back ┄┄┄┄

In the backward pass it is this from right to left: autograd runs, of all that it could, what was last computed.

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

from bam_ray.model.experts_bam import Compute, as_computed

Begun = tuple[Tensor, dist.Work]
"""A collective under way: its output, and what to wait for before reading that."""
Collective = Callable[[Tensor], Begun]


def gathering(x: Tensor, group: ProcessGroup) -> Begun:
    """[B, ...] of each rank -> [E·B, ...], in the order of ranks."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    return out, dist.all_gather_into_tensor(out, x.contiguous(), group=group, async_op=True)


def summing(x: Tensor, group: ProcessGroup) -> Begun:
    """[E·B, ...] of each rank -> this rank's [B, ...] of their sum."""
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return out, dist.reduce_scatter_tensor(out, x.contiguous(), group=group, async_op=True)


def exchanging(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Begun:
    """Send the first sent[0] rows to rank 0, and so on -> received[0] rows of rank 0, and so on."""
    out = rows.new_empty(sum(received), *rows.shape[1:])
    return out, dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group, async_op=True)


def gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """`gathering`, done."""
    out, work = gathering(x, group)
    work.wait()
    return out


class Wire:
    """The way that tokens take between the ranks of a group, and how long these wait for them.

    `aside` are the same ranks once more, for what is to overlap: collectives of one process group wait for one another.
    """

    def __init__(self, group: ProcessGroup, aside: ProcessGroup | None = None) -> None:
        self.group, self.aside = group, aside or group
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def busy(self, device: torch.device) -> Iterator[None]:
        """Tokens are waited for; on a GPU, once it comes to that."""
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
        """Since this was last asked; ranks waiting for one another is in it, what is computed meanwhile is not.

        Waits for the GPU.
        """
        if self._events:
            self._events[-1][1].synchronize()
        seconds: float = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds


class Flight:
    """A collective under way, and in the backward pass its reverse: begun in one place and awaited in another.

    What is computed between `depart` and `arrive` runs beside it, and so does, as gradients go the other way, its
    backward pass. Every rank must begin all collectives in the same order.
    """

    def __init__(self, wire: Wire, there: Collective, back: Collective) -> None:
        self.wire, self.there, self.back = wire, there, back
        self._begun: Begun

    def depart(self, x: Tensor) -> Tensor:
        """Begin -> what must not be read before it has passed `arrive`."""
        out: Tensor = _Depart.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def arrive(self, x: Tensor) -> Tensor:
        """Wait for what `depart` gave."""
        out: Tensor = _Arrive.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def begin(self, x: Tensor, collective: Collective) -> Tensor:
        """Begin `there` or `back`, without gradient."""
        self._begun = collective(x)
        return self._begun[0]

    def wait(self) -> Tensor:
        """Wait for what has begun."""
        out, work = self._begun
        del self._begun
        with self.wire.busy(out.device):
            work.wait()
        return out


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.begin(x, flight.there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.wait(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        ctx.save_for_backward(x.new_empty(0))  # so that recomputation comes as far as this and leaves none under way
        return flight.wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.flight.begin(grads[0], ctx.flight.back)
        return grads[0], None  # of the shape that autograd asks for; `_Depart` gives what comes of it


class AllToAllDispatcher:
    """Rows to the experts they are sorted by and back, rank r of the group having the experts r·n to (r + 1)·n - 1.

    Every rank must call it equally often, in the forward and in the backward pass, with any number of rows: experts or
    ranks that get none take part with zero rows. `meanwhile` is called while rows are on their way to the experts.
    """

    def __init__(self, wire: Wire, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.wire, self.meanwhile = wire, meanwhile

    def __call__(self, compute: Compute, rows: Tensor, counts: Tensor) -> Tensor:
        """Apply expert i of all N to its counts[i] rows, wherever it is: rows [R, d] -> [R, d].

        `compute(rows [R', d], counts [n])` is that of the experts here.
        """
        outgoing = counts.view(self.wire.group.size(), -1)  # [E, n]: to rank, its expert
        incoming = torch.empty_like(outgoing)  # [E, n]: from rank, my expert
        with self.wire.busy(rows.device):
            dist.all_to_all_single(incoming, outgoing, group=self.wire.group)
        sent, received = outgoing.sum(1).tolist(), incoming.sum(1).tolist()
        there = partial(exchanging, sent=sent, received=received, group=self.wire.group)
        back = partial(exchanging, sent=received, received=sent, group=self.wire.group)
        flight = Flight(self.wire, there, back)
        rows = flight.depart(rows)
        self.meanwhile()
        # They come sorted by rank, then expert; an expert wants its rows of all ranks together.
        expert = torch.arange(incoming.shape[1], device=rows.device).repeat(incoming.shape[0])
        order = expert.repeat_interleave(incoming.flatten()).argsort(stable=True)
        rows = compute(flight.arrive(rows).index_select(0, order), incoming.sum(0))
        flight = Flight(self.wire, back, there)
        return flight.arrive(flight.depart(rows.index_select(0, order.argsort())))


class AttentionExchange:
    """Every token to every attention expert: rank r of the group has the experts r·n to (r + 1)·n - 1.

    All ranks bring the same shape [B, L]; positions and masks come another way (`expert_parallel`). One call at a time
    is under way: layers share it.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._gather, self._sum = (partial(collective, group=wire.aside) for collective in (gathering, summing))
        self._stages: Iterator[Tensor] = iter(())  # that are left of the last call

    def __call__(self, x: Tensor, gates: Tensor, attend: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x [B, L, d], gates [B, L, N] -> what gives Σ_i gate_i · Attention_i(x): [B, L, d], once it has `arrived`.

        Tokens are under way, then: `attend` may be called once they may be waited for, and `arrived` must be.
        `attend(x [E·B, L, d], gates [E·B, L, n])` is the weighted sum over the local experts.
        """
        self._stages = self._exchange(x, gates, attend)
        return next(self._stages)

    def attend(self) -> None:
        """Go on with the last call, unless it has arrived: attend to what was gathered, and begin to sum."""
        next(self._stages, None)

    def arrived(self, _: Tensor) -> Tensor:
        """The last call's output [B, L, d], to be read from now on."""
        return list(self._stages)[-1]

    def _exchange(self, x: Tensor, gates: Tensor, attend: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
        flights = [Flight(self.wire, self._gather, self._sum) for _ in range(2)]
        x, gates = (flight.depart(each) for flight, each in zip(flights, (as_computed(x), gates), strict=True))
        yield x
        x, gates = (flight.arrive(each) for flight, each in zip(flights, (x, gates), strict=True))
        group = self.wire.group
        mine = gates.chunk(group.size(), dim=-1)[group.rank()]
        flight = Flight(self.wire, self._sum, self._gather)
        out = flight.depart(attend(x, mine))
        yield out
        yield flight.arrive(out)
