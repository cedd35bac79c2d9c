"""In a parallel block each branch computes while the other communicates, in the forward and in the backward pass."""

import time
from typing import Any

import pytest
import torch

from bam_ray.on_deepspeed.collectives import AsyncCollective, CommTimer
from tests.support.distributed.gloo_ranks import run_on_ranks
from tests.support.distributed.overlap import (
    COLLECTIVES,
    attend_out_of_order,
    attend_two_layers,
    exchanged_dtypes,
    trace_block,
)

GATHER, GATHERED = 2 * ["gather begins"], 2 * ["gather ends"]  # hidden states and gates
SUM, SUMMED = 2 * ["sum begins"], 2 * ["sum ends"]  # the gradients of these
EXCHANGE, EXCHANGED = ["exchange begins"], ["exchange ends"]
COUNTS = EXCHANGE + EXCHANGED
ATTENTION, EXPERTS = ["attention", "sum begins"], ["experts", *EXCHANGE]
ATTENTION_BACK, EXPERTS_BACK = ["attention, backward", *SUM], ["experts, backward", *EXCHANGE]


def order(ranks: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    first, second = ((rank["forward"], rank["backward"]) for rank in ranks)
    assert first == second, "ranks that start collectives in different orders wait for each other forever"
    return first


@pytest.mark.slow
def test_parallel_branches_overlap_with_and_without_recomputation() -> None:
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
def test_sequential_branches_run_one_after_the_other() -> None:
    forward, backward = order(run_on_ranks(2, trace_block, False, False))
    attention = [*GATHER, *GATHERED, *ATTENTION, "sum ends"]
    assert forward == attention + COUNTS + EXCHANGE + EXCHANGED + EXPERTS + EXCHANGED
    attention = ["gather begins", "gather ends", *ATTENTION_BACK, *SUMMED]
    assert backward == EXCHANGE + EXCHANGED + EXPERTS_BACK + EXCHANGED + attention


@pytest.mark.slow
def test_attentions_of_two_layers_can_be_in_flight_together() -> None:
    alone, together = (run_on_ranks(2, attend_two_layers, interleaved) for interleaved in (False, True))
    for wanted, found in zip(alone, together, strict=True):
        assert not torch.equal(wanted["out 0"], wanted["out 1"])
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.slow
def test_steps_of_an_attention_in_flight_must_come_in_order() -> None:
    for messages in run_on_ranks(2, attend_out_of_order):
        assert messages == [
            f"PendingAttention.{call}() was called out of order (next: {due}): call compute() once, then wait() once"
            for call, due in (("wait", "compute"), ("compute", "wait"))
        ]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "torch.float32"), ("bf16", "torch.bfloat16")])
def test_tokens_travel_in_the_precision_of_the_experts(precision: str, dtype: str) -> None:
    for found in run_on_ranks(2, exchanged_dtypes, precision):
        assert found == {(name, dtype) for name in COLLECTIVES.values()}


class InstantWork:
    """The handle of a collective that takes no time."""

    def wait(self) -> None:
        """Do nothing."""


def test_timer_excludes_overlapped_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class SlowWork:
        def wait(self) -> None:
            now[0] += 2.0

    class SlowComputation(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            now[0] += 5.0
            return x * 3

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            now[0] += 5.0
            return grads[0] * 3

    timer = CommTimer()
    collective = AsyncCollective(timer, lambda x: (x * 10, SlowWork()), lambda x: (x * 100, SlowWork()))
    x = torch.ones(2, requires_grad=True)
    in_flight = collective.start(x)
    computed = SlowComputation.apply(x)
    out = collective.wait(in_flight) + computed
    assert (out.tolist(), timer.pop_seconds()) == ([13.0, 13.0], 2.0)
    out.sum().backward()
    assert x.grad is not None
    assert (x.grad.tolist(), timer.pop_seconds(), now[0]) == ([103.0, 103.0], 2.0, 14.0)


def test_waiting_for_a_collective_twice_is_refused() -> None:
    collective = AsyncCollective(CommTimer(), lambda x: (x * 10, InstantWork()), lambda x: (x, InstantWork()))
    started = collective.start(torch.ones(2))
    assert collective.wait(started).tolist() == [10.0, 10.0]
    with pytest.raises(RuntimeError, match=r"call start\(\) once, then wait\(\) once"):
        collective.wait(started)
    with pytest.raises(RuntimeError, match=r"call start\(\) once, then wait\(\) once"):
        AsyncCollective(CommTimer(), collective.forward, collective.backward).wait(started)
