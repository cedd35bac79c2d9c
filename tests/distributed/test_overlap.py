"""In a parallel block each branch computes beside what is under way for the other, forward and backward."""

import time
from typing import Any, cast

import pytest
import torch
from torch.distributed import ProcessGroup

from bam_ray.on_deepspeed.dispatch import Flight, Wire
from tests.support.distributed.gloo_ranks import run_on_ranks
from tests.support.distributed.overlap import COLLECTIVES, exchanged_dtypes, trace_block

GATHER, GATHERED = 2 * ["gather begins"], 2 * ["gather ends"]  # hidden states and gates
SUM, SUMMED = 2 * ["sum begins"], 2 * ["sum ends"]  # their gradients
EXCHANGE, EXCHANGED = ["exchange begins"], ["exchange ends"]
COUNTS = EXCHANGE + EXCHANGED
ATTENTION, EXPERTS = ["attention", "sum begins"], ["experts", *EXCHANGE]
ATTENTION_BACK, EXPERTS_BACK = ["attention, backward", *SUM], ["experts, backward", *EXCHANGE]


def order(ranks: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    first, second = ((rank["forward"], rank["backward"]) for rank in ranks)
    assert first == second, "ranks that begin collectives in different orders wait for each other for ever"
    return first


@pytest.mark.slow
def test_the_branches_of_a_parallel_block_overlap_recomputed_or_not() -> None:
    plain, recomputed = (run_on_ranks(2, trace_block, True, again) for again in (False, True))
    forward = [
        *GATHER,
        *COUNTS,
        *EXCHANGE,
        *GATHERED,
        *ATTENTION,
        *EXCHANGED,
        *EXPERTS,
        *EXCHANGED,
        "sum ends",
    ]
    backward = [
        "gather begins",
        *EXCHANGE,
        *EXCHANGED,
        *EXPERTS_BACK,
        "gather ends",
        *ATTENTION_BACK,
        *EXCHANGED,
        *SUMMED,
    ]
    assert order(plain) == (forward, backward)
    assert order(recomputed) == (forward, ["gather begins", *forward, *backward[1:]])
    for one, other in zip(plain, recomputed, strict=True):
        assert min(gradient.abs().max() for gradient in one["gradients"].values()) > 0
        torch.testing.assert_close(other["gradients"], one["gradients"], rtol=0, atol=0)


@pytest.mark.slow
def test_those_of_a_sequential_block_come_one_after_the_other() -> None:
    forward, backward = order(run_on_ranks(2, trace_block, False, False))
    attention = [*GATHER, *GATHERED, *ATTENTION, "sum ends"]
    assert forward == attention + COUNTS + EXCHANGE + EXCHANGED + EXPERTS + EXCHANGED
    attention = ["gather begins", "gather ends", *ATTENTION_BACK, *SUMMED]
    assert backward == EXCHANGE + EXCHANGED + EXPERTS_BACK + EXCHANGED + attention


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "torch.float32"), ("bf16", "torch.bfloat16")])
def test_tokens_travel_in_the_precision_that_experts_compute_in(precision: str, dtype: str) -> None:
    for found in run_on_ranks(2, exchanged_dtypes, precision):
        assert found == {(name, dtype) for name in COLLECTIVES.values()}


def test_only_what_is_waited_counts_as_time_on_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Work:
        def wait(self) -> None:
            now[0] += 2.0

    class Computing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            now[0] += 5.0
            return x * 3

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            now[0] += 5.0
            return grads[0] * 3

    wire = Wire(cast(ProcessGroup, None))
    flight = Flight(wire, lambda x: (x * 10, Work()), lambda x: (x * 100, Work()))
    x = torch.ones(2, requires_grad=True)
    under_way = flight.depart(x)
    computed = Computing.apply(x)
    out = flight.arrive(under_way) + computed
    assert (out.tolist(), wire.seconds()) == ([13.0, 13.0], 2.0)
    out.sum().backward()
    assert x.grad is not None
    assert (x.grad.tolist(), wire.seconds(), now[0]) == ([103.0, 103.0], 2.0, 14.0)
