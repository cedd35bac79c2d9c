"""A layer holds its attention while it is in flight, and its steps must be called in order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bam_ray.model import BamConfig
from bam_ray.model.attention_bam import BamRotaryEmbedding
from bam_ray.model.attention_exchange_bam import (
    Attend,
    ComputedAttention,
    LocalAttentionExchange,
    PendingAttention,
)
from bam_ray.model.layers_bam import BamDecoderLayer
from bam_ray.model.token_dispatch_bam import LocalTokenDispatcher
from tests.support import tiny

ORDER = r"call compute\(\) once, then wait\(\) once"


def build(**settings: Any) -> tuple[BamDecoderLayer, dict[str, Any]]:
    """Return a random layer and the arguments of its attention for sequences of 9 tokens."""
    torch.manual_seed(0)
    config = BamConfig(**{**tiny.SIZES, **settings}, attn_implementation="sdpa")
    layer = BamDecoderLayer(config, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    positions = BamRotaryEmbedding(config)(torch.empty(0), torch.arange(9)[None])
    return layer, {"position_embeddings": positions, "attention_mask": None, "cache": None}


class LoggedAttention(PendingAttention):
    """An attention that computes its output in `compute`, and logs its steps."""

    def __init__(self, compute: Callable[[], Tensor], log: list[str]) -> None:
        super().__init__()
        self.compute_out, self.log = compute, log

    def _compute(self) -> None:
        self.log.append("compute")
        self.out = self.compute_out()

    def _wait(self) -> Tensor:
        self.log.append("wait")
        return self.out


class LoggedExchange:
    """An exchange that defers the attention to `compute`, as a collective does."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def start(self, x: Tensor, gates: Tensor, attend: Attend) -> PendingAttention:
        self.log.append("start")
        return LoggedAttention(lambda: attend(x, gates), self.log)


class LoggedDispatcher(LocalTokenDispatcher):
    """The local dispatcher, with a log of its calls."""

    def __init__(self, num_experts: int, log: list[str]) -> None:
        super().__init__(num_experts)
        self.log = log

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        self.log.append("dispatch")
        return super().dispatch(*args, **kwargs)

    def combine(self, *args: Any, **kwargs: Any) -> Tensor:
        self.log.append("combine")
        return super().combine(*args, **kwargs)


@pytest.mark.parametrize(
    ("parallel", "order"),
    [
        (True, ["start", "dispatch", "compute", "combine", "wait"]),
        (False, ["start", "compute", "wait", "dispatch", "combine"]),
    ],
)
def test_layer_overlaps_attention_with_ffn_in_parallel_blocks_only(parallel: bool, order: list[str]) -> None:
    layer, positions = build(parallel_block=parallel)
    x = torch.randn(2, 9, 32)
    want = layer(x, **positions)[0]
    log: list[str] = []
    layer.self_attn.exchange = LoggedExchange(log)
    layer.mlp.experts.dispatcher = LoggedDispatcher(4, log)
    assert torch.equal(layer(x, **positions)[0], want)
    assert log == order


def test_dense_ffn_computes_attention_too() -> None:
    layer, positions = build(dense_layers=[0])
    assert layer(torch.randn(2, 9, 32), **positions)[0].shape == (2, 9, 32)


@pytest.mark.parametrize(
    "calls", [["wait"], ["compute", "compute"], ["compute", "wait", "wait"], ["result", "compute"]]
)
@pytest.mark.parametrize("local", [True, False])
def test_steps_out_of_order_are_refused(calls: list[str], local: bool) -> None:
    out = torch.zeros(1, 2, 3)
    pending: PendingAttention = ComputedAttention(out) if local else LoggedAttention(lambda: out, [])
    for call in calls[:-1]:
        getattr(pending, call)()
    with pytest.raises(RuntimeError, match=rf"PendingAttention\.{calls[-1]}\(\) was called out of order.*{ORDER}"):
        getattr(pending, calls[-1])()


def test_ffn_that_does_not_overlap_gives_the_same_output(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, positions = build()
    x = torch.randn(2, 9, 32)
    want = layer(x, **positions)[0]
    forward = layer.mlp.forward
    monkeypatch.setattr(layer.mlp, "forward", lambda x, non_padding, overlap, routing: forward(x, non_padding))
    assert torch.equal(layer(x, **positions)[0], want)


def test_attentions_of_one_exchange_do_not_overwrite_each_other() -> None:
    log: list[str] = []
    for exchange in (LocalAttentionExchange(), LoggedExchange(log)):
        tensors = [torch.full((1, 2, 3), value) for value in (1.0, 2.0)]
        first, second = (exchange.start(x, torch.ones(1, 2, 1), torch.mul) for x in tensors)
        second.compute()
        first.compute()
        assert torch.equal(first.wait(), tensors[0])
        assert torch.equal(second.wait(), tensors[1])
