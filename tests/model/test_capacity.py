"""With a capacity, experts take what they have room for, in training alone, and what they leave out costs nothing."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bam_ray.model import BamConfig, BamForCausalLM, dropped_share, routing_losses
from bam_ray.model.experts_bam import BamExperts
from bam_ray.model.modeling_bam import BamMoE
from tests.support import tiny

K, N = 2, 4


def build(factor: float | None, **more: Any) -> BamForCausalLM:
    torch.manual_seed(0)
    return BamForCausalLM(
        BamConfig(**{**tiny.SIZES, "num_experts_per_tok": K, "capacity_factor": factor, **more})
    ).train()


def computed(model: BamForCausalLM, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the experts of each layer compute."""
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


def token_by_token(moe: BamMoE, x: Tensor, real: Tensor, factor: float) -> tuple[Tensor, int]:
    """The FFN of x [B, L, d] as a loop over tokens and their choices, and how many of these found no room."""
    rows, dropped = [], 0
    for sequence, is_real in zip(x, real, strict=True):
        capacity = math.ceil(factor * K * int(is_real.sum()) / N)
        taken = [0] * N
        for token, counts in zip(sequence, is_real.tolist(), strict=True):
            out = torch.zeros_like(token)
            probabilities = (moe.gate.weight @ token).softmax(-1)
            for expert in probabilities.topk(K).indices.tolist() if counts else []:
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
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(factor: float, padding: int) -> None:
    moe = build(factor).model.layers[0].mlp
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, :padding] = False
    grad = torch.randn(2, 11, 32)
    found = []
    for forward in (
        lambda x: moe(x, real if padding else None)[0],
        lambda x: token_by_token(moe, x, real, factor)[0],
    ):
        x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        moe.zero_grad()
        out = forward(x)
        out.backward(grad)
        found.append([out, x.grad, *(parameter.grad.clone() for parameter in moe.parameters())])
    assert token_by_token(moe, x, real, factor)[1] > 0
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_enough_room_is_no_limit_and_inference_has_none() -> None:
    ids = tiny.tokens()
    without, roomy, tight = build(None), build(float(N)), build(0.5)
    gradients = []
    for model in (without, roomy):
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    with torch.no_grad():
        assert not torch.equal(tight(ids).logits, without(ids).logits)
        assert torch.equal(tight.eval()(ids).logits, without.eval()(ids).logits)


def test_what_is_dropped_is_not_computed_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny.tokens(3, 16)
    for settings in ({}, {"noisy_gate": True, "selection_bias": True}):
        model = build(0.75, **settings)
        for layer in model.model.layers:
            if settings:
                layer.mlp.gate.selection_bias.copy_(torch.tensor([0.0, 0.5, -0.5, 0.0]))
                torch.nn.init.normal_(layer.mlp.gate.noise_weight)
        torch.manual_seed(1)
        rows = torch.tensor(computed(model, ids, monkeypatch))
        torch.manual_seed(1)
        logits = model(ids, output_router_logits=True).router_logits
        chosen = routing_losses(logits, K, bias=model.selection_biases()).chosen
        dropped = dropped_share(chosen, model.config, len(ids))
        assert (dropped > 0).all()
        torch.testing.assert_close(dropped, 1 - rows / (ids.numel() * K))
    assert dropped_share(chosen, build(None).config, len(ids)).tolist() == [0.0, 0.0]


@torch.no_grad()
def test_a_sequence_meets_the_same_experts_whatever_is_beside_or_after_it() -> None:
    model, ids = build(0.5), tiny.tokens(4, 16)
    whole = model(ids).logits
    for row, logits in zip(ids, whole, strict=True):
        torch.testing.assert_close(model(row[None]).logits[0], logits, atol=1e-5, rtol=1e-5)
    padded = model(F.pad(ids, (0, 5)), attention_mask=F.pad(torch.ones_like(ids), (0, 5))).logits[:, :16]
    torch.testing.assert_close(padded, whole, atol=1e-5, rtol=1e-5)
    other = torch.cat((ids[:, :9], tiny.tokens(4, 7, seed=1)), dim=1)
    torch.testing.assert_close(model(other).logits[:, :9], whole[:, :9], atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, ids = build(0.5), tiny.tokens()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_balance_counts_choices_before_any_is_dropped() -> None:
    ids = tiny.tokens()
    first = [build(factor)(ids, output_router_logits=True).router_logits[0] for factor in (None, 0.3)]
    assert torch.equal(first[0], first[1])
    losses = [routing_losses((logits,), K) for logits in first]
    assert torch.equal(losses[0].share, losses[1].share)
    assert torch.equal(losses[0].load_balance, losses[1].load_balance)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_capacity_of_nothing_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=r"capacity_factor is .*: use a number above 0, or None to drop nothing"):
        BamConfig(capacity_factor=factor)
