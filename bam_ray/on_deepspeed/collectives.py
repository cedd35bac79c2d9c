"""Collectives that are started in one place and waited for in another, in the forward and in the backward pass.

Shapes: E ranks of a process group, B batch on one rank, R rows on one rank.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Started = tuple[Tensor, dist.Work]
"""A collective that was started: its output, and the handle to wait for before the output is read."""
StartCollective = Callable[[Tensor], Started]


def start_all_gather(x: Tensor, group: ProcessGroup) -> Started:
    """Start to gather x [B, ...] of all ranks: [E·B, ...], in the order of ranks."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    return out, dist.all_gather_into_tensor(out, x.contiguous(), group=group, async_op=True)


def start_reduce_scatter(x: Tensor, group: ProcessGroup) -> Started:
    """Start to sum x [E·B, ...] over all ranks; each rank receives its part [B, ...] of the sum."""
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return out, dist.reduce_scatter_tensor(out, x.contiguous(), group=group, async_op=True)


def start_all_to_all(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Started:
    """Start to exchange rows [R, ...]: the first sent[0] go to rank 0, and so on.

    The output starts with received[0] rows of rank 0, and so on.
    """
    out = rows.new_empty(sum(received), *rows.shape[1:])
    return out, dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group, async_op=True)


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Gather x [B, ...] of all ranks: [E·B, ...], in the order of ranks."""
    out, work = start_all_gather(x, group)
    work.wait()
    return out


class CommTimer:
    """The time that this rank spends waiting for collectives.

    It includes the time by which other ranks are late, and excludes computation that overlaps with a collective.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Add the time that the body takes; on a GPU, the time that it takes in the current stream."""
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

    def pop_seconds(self) -> float:
        """Return the seconds since the last call and reset them. Waits for the GPU."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds: float = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds


@dataclass(frozen=True)
class EPGroup:
    """The ranks among which the experts of a model are divided.

    `side_group` has the same ranks as `process_group`. Collectives of one process group run one after the other, so
    those that overlap need a second one.
    """

    process_group: ProcessGroup
    side_group: ProcessGroup
    timer: CommTimer = field(default_factory=CommTimer)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.process_group.size()

    @property
    def rank(self) -> int:
        """The index of this rank."""
        return self.process_group.rank()

    def connect(self, device: torch.device) -> None:
        """Make the communicators of both groups with one small collective of each kind. All ranks call this."""
        one = torch.zeros(self.size, device=device)
        for group in (self.process_group, self.side_group):
            for _, work in (
                start_all_to_all(one, [1] * self.size, [1] * self.size, group),
                start_all_gather(one, group),
                start_reduce_scatter(one, group),
            ):
                work.wait()


class AsyncCollective:
    """A collective whose gradient is the reverse collective.

    What is computed between `start` and `wait` overlaps with the collective. In the backward pass, the gradient of
    `wait` starts the reverse collective and the gradient of `start` waits for it, so that the backward pass of the same
    computation overlaps with the reverse collective. All ranks must start all collectives in the same order.
    """

    def __init__(self, timer: CommTimer, forward: StartCollective, backward: StartCollective) -> None:
        self.timer, self.forward, self.backward = timer, forward, backward
        self._started: Started | None = None

    def start(self, x: Tensor) -> Tensor:
        """Start the collective. The returned tensor must not be read, only passed to `wait`."""
        out: Tensor = _Start.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def wait(self, x: Tensor) -> Tensor:
        """Wait for the collective; x is the tensor that `start` returned.

        Raises:
            RuntimeError: If the collective was not started, or was waited for already.
        """
        out: Tensor = _Wait.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def launch(self, x: Tensor, collective: StartCollective) -> Tensor:
        """Start `forward` or `backward` without a gradient, and return the output that is not yet filled."""
        self._started = collective(x)
        return self._started[0]

    def finish(self) -> Tensor:
        """Wait for the collective that was launched last, without a gradient, and return its output."""
        if self._started is None:
            raise RuntimeError("AsyncCollective.wait() was called out of order: call start() once, then wait() once")
        out, work = self._started
        self._started = None
        with self.timer.measure(out.device):
            work.wait()
        return out


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, collective: AsyncCollective) -> Tensor:
        ctx.collective = collective
        return collective.launch(x, collective.forward)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.collective.finish(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, collective: AsyncCollective) -> Tensor:
        ctx.collective = collective
        # Activation checkpointing stops to recompute after the last saved tensor. Because of this one, it recomputes
        # this function too, and leaves no collective without its wait.
        ctx.save_for_backward(x.new_empty(0))
        return collective.finish()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.collective.launch(grads[0], ctx.collective.backward)
        # Autograd expects a gradient with the shape of x. It is not read: `_Start` returns the received gradient.
        return grads[0], None
