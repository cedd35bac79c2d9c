"""FFN routers: selection biases, noisy gates, and the losses that balance the experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Normal

from bam_ray.evaluation.perplexity import score
from bam_ray.model import BamConfig, BamForCausalLM, RouterOutput, routing_losses
from tests.support import tiny

BOTH = {"noisy_gate": True, "selection_bias": True}


def build(**more: Any) -> BamForCausalLM:
    torch.manual_seed(0)
    model = BamForCausalLM(BamConfig(**{**tiny.SIZES, "num_experts_per_tok": 2, **more}))
    with torch.no_grad():
        for layer in model.model.layers:
            if model.config.selection_bias:
                layer.mlp.gate.selection_bias.copy_(torch.tensor([0.0, 0.5, -0.5, 0.0]))
            if model.config.noisy_gate:
                layer.mlp.gate.noise_weight.normal_()
    return model.eval()


def test_share_counts_all_choices_of_a_token() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [3.0, 2.0, 1.0]])
    losses = routing_losses([RouterOutput(logits)], 2)
    torch.testing.assert_close(losses.share, torch.tensor([[3.0, 2.0, 1.0]]) / 6)
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(losses.load_balance, 3 * (losses.share[0] * probabilities.mean(0)).sum())
    torch.testing.assert_close(losses.entropy, -(probabilities * probabilities.log()).sum(-1).view(1, -1))


def test_selection_bias_changes_the_choice_and_not_the_weight() -> None:
    model = build(selection_bias=True)
    moe = model.model.layers[0].mlp
    index, weights = moe.route(torch.zeros(5, 4))
    assert index.tolist() == [[1, 0]] * 5 or index.tolist() == [[1, 3]] * 5
    torch.testing.assert_close(weights, torch.full((5, 2), 0.25))
    ids = tiny.tokens(4, 16)
    seen: list[torch.Tensor] = []
    moe.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    routing = score(model, ids.numpy(), 4).routing
    assert routing is not None
    counted = seen[0].flatten().bincount(minlength=4) / seen[0].numel()
    assert routing.layers[0].ffn_share == pytest.approx(counted.tolist())
    routers = model.model(ids).router_outputs
    share = routing_losses(routers, 2, bias=model.selection_biases()).share[0]
    assert share.tolist() == pytest.approx(counted.tolist())
    assert share.tolist() != pytest.approx(routing_losses(routers, 2).share[0].tolist())


def test_noise_is_added_in_training_only_and_is_seeded() -> None:
    model, ids = build(noisy_gate=True), tiny.tokens()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, build()(ids).logits)
        model.train()
        torch.manual_seed(1)
        one = model(ids).logits
        torch.manual_seed(1)
        assert torch.equal(model(ids).logits, one)
        assert not torch.equal(model(ids).logits, one)


def test_recomputation_repeats_the_noise() -> None:
    gradients = []
    for recomputed in (False, True):
        model, ids = build(noisy_gate=True).train(), tiny.tokens()
        if recomputed:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0]["model.layers.0.mlp.gate.noise_weight"].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def noisy_router(tokens: int = 6, experts: int = 4) -> RouterOutput:
    """Return random logits with noise, logits without noise, and the scale of the noise, each [T, N]."""
    torch.manual_seed(0)
    clean, scale = torch.randn(tokens, experts), torch.rand(tokens, experts) + 0.1
    return RouterOutput(clean + torch.randn(tokens, experts) * scale, clean, scale)


def test_noisy_gate_fills_all_fields_of_the_router_output() -> None:
    model, ids = build(noisy_gate=True).train(), tiny.tokens()
    router = model.model(ids).router_outputs[0]
    assert [field.shape for field in router] == [(ids.numel(), 4)] * 3
    assert not torch.equal(router.logits, router.clean_logits)
    router = model.eval().model(ids).router_outputs[0]
    assert router[1:] == (None, None)


def test_noisy_balance_loss_equals_a_loop_over_tokens() -> None:
    router = noisy_router()
    noisy, clean, scale = router
    importance, load = torch.zeros(4), torch.zeros(4)
    for token in range(6):
        best = noisy[token].topk(2)
        importance[best.indices] += best.values.softmax(-1)
        for expert in range(4):
            others = torch.cat((noisy[token, :expert], noisy[token, expert + 1 :]))
            rival = others.topk(2).values[1]
            load[expert] += Normal(0.0, 1.0).cdf((clean[token, expert] - rival) / scale[token, expert])
    want = sum(each.var() / each.mean().square() for each in (importance, load))
    losses = routing_losses((router, router), 2)
    torch.testing.assert_close(losses.load_balance, 2 * want)
    torch.testing.assert_close(losses.router_z, 2 * clean.logsumexp(-1).square().mean())
    chosen = noisy.topk(2).indices.flatten().bincount(minlength=4) / 12
    torch.testing.assert_close(losses.share, chosen.expand(2, 4))


def test_noisy_balance_loss_is_zero_if_experts_are_balanced() -> None:
    balanced = RouterOutput(torch.eye(4) * 9, torch.eye(4) * 9, torch.full((4, 4), 0.1))
    assert routing_losses((balanced,), 1).load_balance < 1e-6
    # All experts are selected here, but with different weights.
    assert routing_losses((noisy_router(),), 4).load_balance > 0


@pytest.mark.parametrize("noisy", [True, False])
def test_ranks_have_the_loss_and_gradient_of_the_global_batch(noisy: bool) -> None:
    logits = torch.stack(tuple(noisy_router()))  # [3, T, N]
    whole = (logits if noisy else logits[:1]).requires_grad_()
    halves = [half.detach().requires_grad_() for half in whole.chunk(2, dim=-2)]
    wanted = routing_losses((RouterOutput(*whole),), 2).load_balance
    wanted.backward()
    reduced: list[list[torch.Tensor]] = [[], []]  # the tensors that each rank asks to be averaged

    def collect(rank: int, mine: torch.Tensor) -> torch.Tensor:
        reduced[rank].append(mine.clone())
        return mine

    for rank, half in enumerate(halves):
        routing_losses((RouterOutput(*half),), 2, lambda mine, rank=rank: collect(rank, mine))
    means = [torch.stack(parts).mean(0) for parts in zip(*reduced, strict=True)]
    losses = []
    for half in halves:
        answers = [mean.clone() for mean in means]
        router = RouterOutput(*half)
        losses.append(routing_losses((router,), 2, lambda _, answers=answers: answers.pop(0)).load_balance)
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(torch.stack(losses).mean(), wanted)
    assert whole.grad is not None
    torch.testing.assert_close(torch.cat([half.grad for half in halves], dim=-2), whole.grad)


def test_noise_weights_and_biases_are_saved_or_start_at_zero(tmp_path: Path) -> None:
    model = build(**BOTH)
    model.save_pretrained(tmp_path / "both")
    again = BamForCausalLM.from_pretrained(tmp_path / "both")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    build().save_pretrained(tmp_path / "plain")
    given = BamForCausalLM.from_pretrained(tmp_path / "plain", **BOTH)
    gate = given.model.layers[1].mlp.gate
    assert gate.noise_weight.abs().max() == gate.selection_bias.abs().max() == 0
    assert torch.equal(gate.weight, build().model.layers[1].mlp.gate.weight)
