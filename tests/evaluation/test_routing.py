import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bam_ray.evaluation.perplexity import score
from bam_ray.evaluation.results import DomainRouting
from bam_ray.evaluation.routing import combine_domains
from bam_ray.model import BamForCausalLM
from tests.support.tiny import dense, tokens

ROWS = tokens(batch=6, length=10).numpy()
Mixture = Callable[..., BamForCausalLM]


def routing_on(model: BamForCausalLM, rows: np.ndarray = ROWS, batch: int = 4) -> DomainRouting:
    routing = score(model, rows, batch).routing
    assert routing is not None
    return routing


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_shares_and_probabilities_are_distributions(mixture: Mixture, top_k: int) -> None:
    routing = routing_on(mixture(num_experts_per_tok=top_k))
    assert routing.tokens == 60
    assert len(routing.layers) == 2
    for layer in routing.layers:
        assert sum(layer.ffn_share) == pytest.approx(1.0, abs=1e-12)
        assert max(layer.ffn_share) <= 1 / top_k + 1e-12  # a token chooses an expert once
        assert sum(layer.ffn_probability) == pytest.approx(1.0, abs=1e-6)
        assert sum(layer.attention_gate) == pytest.approx(1.0, abs=1e-6)
        assert 1.0 <= layer.load_imbalance <= 4 / top_k + 1e-9
        assert 0.0 < layer.ffn_entropy < math.log(4)
    if top_k == 4:
        assert routing.layers[0].ffn_share == (0.25,) * 4


def test_shares_equal_the_choices_of_the_model(mixture: Mixture) -> None:
    model = mixture(num_experts_per_tok=2)
    seen: list[torch.Tensor] = []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    layer = routing_on(model).layers[1]
    counts = torch.cat(seen).flatten().bincount(minlength=4)
    assert layer.ffn_share == pytest.approx((counts / counts.sum()).tolist())


def test_the_batch_size_has_no_effect(mixture: Mixture) -> None:
    model = mixture()
    one, six = routing_on(model, batch=1), routing_on(model, batch=6)
    for left, right in zip(one.layers, six.layers, strict=True):
        assert left.ffn_share == right.ffn_share
        assert left.ffn_probability == pytest.approx(right.ffn_probability, abs=1e-6)
        assert left.attention_gate == pytest.approx(right.attention_gate, abs=1e-6)


def test_uniform_routers_have_maximum_entropy(mixture: Mixture) -> None:
    model = mixture()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.self_attn.gate.weight.zero_()
    for layer in routing_on(model).layers:
        assert layer.ffn_probability == pytest.approx((0.25,) * 4)
        assert layer.attention_gate == pytest.approx((0.25,) * 4)
        assert layer.ffn_entropy == pytest.approx(math.log(4))
        assert layer.attention_entropy == pytest.approx(math.log(4))
        assert layer.load_imbalance == 4.0, "ties select one expert for every token"
        assert len(layer.dead_experts) == 3


def test_averaged_attention_has_no_gates_and_top_1_keeps_one(mixture: Mixture) -> None:
    btx = routing_on(mixture(attention_experts="averaged", num_experts_per_tok=2)).layers[0]
    assert (btx.attention_gate, btx.attention_entropy) == ((), None)
    soft = routing_on(mixture()).layers[0]
    top_1 = routing_on(mixture(num_attention_experts_per_tok=1)).layers[0]
    assert 0.25 < sum(top_1.attention_gate) < 0.95
    assert top_1.attention_entropy == pytest.approx(soft.attention_entropy)


def test_overall_routing_weights_domains_by_their_tokens(mixture: Mixture) -> None:
    model = mixture(expert_names=["seed", "code", "law", "math"])
    routing = combine_domains(model.config, {"code": routing_on(model, ROWS[:2]), "law": routing_on(model, ROWS[2:])})
    expected = routing_on(model)
    assert routing.expert_names == ("seed", "code", "law", "math")
    assert routing.overall.tokens == expected.tokens
    for pooled, counted in zip(routing.overall.layers, expected.layers, strict=True):
        assert pooled.ffn_share == pytest.approx(counted.ffn_share)
        assert pooled.attention_gate == pytest.approx(counted.attention_gate)
        assert pooled.attention_entropy == pytest.approx(counted.attention_entropy)
        assert pooled.dead_experts == counted.dead_experts
        assert pooled.load_imbalance == pytest.approx(counted.load_imbalance)


def test_dense_models_have_no_routing() -> None:
    assert score(dense("llama", seed=0), ROWS, 4).routing is None
