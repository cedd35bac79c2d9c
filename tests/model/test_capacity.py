"""A capacity limits the tokens of each expert in training only, and dropped choices are not computed."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bam_ray.model import BamConfig, BamForCausalLM, dropped_share, routing_losses
from bam_ray.model.experts_bam import BamExperts
from bam_ray.model.layers_bam import BamMoE
from tests.support import tiny

K, N = 2, 4


def build(factor: float | None, **more: Any) -> BamForCausalLM:
    torch.manual_seed(0)
    return BamForCausalLM(
        BamConfig(**{**tiny.SIZES, "num_experts_per_tok": K, "capacity_factor": factor, **more})
    ).train()


def computed_rows(model: BamForCausalLM, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of rows that the experts of each layer compute."""
    rows = []
    compute = BamExperts.compute

    def counted(self: BamExperts, given: Tensor, counts: Tensor) -> Tensor:
        assert counts.sum() == len(given)
        rows.append(len(given))
        return compute(self, given, counts)

    with monkeypatch.context() as patch:
        patch.setattr(BamExperts, "compute", counted)
        model(ids)
    return rows


def token_by_token(moe: BamMoE, x: Tensor, non_padding: Tensor, factor: float) -> tuple[Tensor, int]:
    """Compute the FFN of x [B, L, d] as a loop over tokens; return it with the number of dropped choices."""
    rows, dropped = [], 0
    for sequence, counted in zip(x, non_padding, strict=True):
        capacity = math.ceil(factor * K * int(counted.sum()) / N)
        taken = [0] * N
        for token, is_counted in zip(sequence, counted.tolist(), strict=True):
            out = torch.zeros_like(token)
            probabilities = (moe.gate.weight @ token).softmax(-1)
            for expert in probabilities.topk(K).indices.tolist() if is_counted else []:
                if taken[expert] == capacity:
                    dropped += 1
                    continue
                taken[expert] += 1
                gate, up = (moe.experts.gate_up_proj[expert] @ token).chunk(2)
                out = out + probabilities[expert] * (moe.experts.down_proj[expert] @ (F.silu(gate) * up))
            rows.append(out)
    return torch.stack(rows).view_as(x), dropped


@pytest.mark.parametrize("factor", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("padding", [0, 3])
def test_outputs_and_gradients_equal_a_loop_over_tokens(factor: float, padding: int) -> None:
    moe = build(factor).model.layers[0].mlp
    non_padding = torch.ones(2, 11, dtype=torch.bool)
    non_padding[1, :padding] = False
    grad = torch.randn(2, 11, 32)
    found = []
    for forward in (
        lambda x: moe(x, non_padding if padding else None)[0],
        lambda x: token_by_token(moe, x, non_padding, factor)[0],
    ):
        x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        moe.zero_grad()
        out = forward(x)
        out.backward(grad)
        found.append([out, x.grad, *(parameter.grad.clone() for parameter in moe.parameters())])
    assert token_by_token(moe, x, non_padding, factor)[1] > 0
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_large_capacity_and_inference_drop_nothing() -> None:
    ids = tiny.tokens()
    unlimited, large, small = build(None), build(float(N)), build(0.5)
    gradients = []
    for model in (unlimited, large):
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    with torch.no_grad():
        assert not torch.equal(small(ids).logits, unlimited(ids).logits)
        assert torch.equal(small.eval()(ids).logits, unlimited.eval()(ids).logits)


def test_dropped_choices_are_not_computed_but_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny.tokens(3, 16)
    for settings in ({}, {"noisy_gate": True, "selection_bias": True}):
        model = build(0.75, **settings)
        for layer in model.model.layers:
            if settings:
                layer.mlp.gate.selection_bias.copy_(torch.tensor([0.0, 0.5, -0.5, 0.0]))
                torch.nn.init.normal_(layer.mlp.gate.noise_weight)
        torch.manual_seed(1)
        rows = torch.tensor(computed_rows(model, ids, monkeypatch))
        torch.manual_seed(1)
        routers = model.model(ids).router_outputs
        chosen = routing_losses(routers, K, bias=model.selection_biases()).chosen
        dropped = dropped_share(chosen, model.config, len(ids))
        assert (dropped > 0).all()
        torch.testing.assert_close(dropped, 1 - rows / (ids.numel() * K))
    assert dropped_share(chosen, build(None).config, len(ids)).tolist() == [0.0, 0.0]


@torch.no_grad()
def test_dropping_depends_on_earlier_tokens_of_the_sequence_only() -> None:
    model, ids = build(0.5), tiny.tokens(4, 16)
    whole = model(ids).logits
    for row, logits in zip(ids, whole, strict=True):
        torch.testing.assert_close(model(row[None]).logits[0], logits, atol=1e-5, rtol=1e-5)
    padded = model(F.pad(ids, (0, 5)), attention_mask=F.pad(torch.ones_like(ids), (0, 5))).logits[:, :16]
    torch.testing.assert_close(padded, whole, atol=1e-5, rtol=1e-5)
    other = torch.cat((ids[:, :9], tiny.tokens(4, 7, seed=1)), dim=1)
    torch.testing.assert_close(model(other).logits[:, :9], whole[:, :9], atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_keeps_gradients_with_a_capacity() -> None:
    tiny.assert_recomputation_keeps_gradients(build(0.5), tiny.tokens())


def test_balance_loss_includes_dropped_choices() -> None:
    ids = tiny.tokens()
    first = [build(factor).model(ids).router_outputs[0] for factor in (None, 0.3)]
    assert torch.equal(first[0].logits, first[1].logits)
    losses = [routing_losses((router,), K) for router in first]
    assert torch.equal(losses[0].share, losses[1].share)
    assert torch.equal(losses[0].load_balance, losses[1].load_balance)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_capacity_must_be_positive(factor: float) -> None:
    with pytest.raises(ValueError, match=r"capacity_factor is .*: use a number above 0, or None to drop no choices"):
        BamConfig(capacity_factor=factor)
