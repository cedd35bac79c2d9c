"""The counted operations follow from the parameters that a token uses and the keys that it attends to."""

import copy
from typing import Any

import pytest
from transformers import PreTrainedModel

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.domain_vectors import DomainVectorsConfig, DomainVectorsForCausalLM
from bam_ray.model.embeddings_bam import BamInputEmbeddings
from bam_ray.model.parameters import count_parameters
from bam_ray.training.flops import forward_flops_per_token, training_flops
from tests.support import tiny

MIXTURES: dict[str, dict[str, Any]] = {
    "bam": {"num_experts_per_tok": 2},
    "shared keys, shared expert": {"attention_experts": "kv_shared", "shared_expert_intermediate_size": 24},
    "averaged, plain FFN": {"attention_experts": "averaged", "mlp_gated": False},
    "embedding experts": {"embeddings": "experts", "router_input": "prefix"},
    "embedding experts, untied": {
        "embeddings": "experts",
        "attention_experts": "averaged",
        "tie_word_embeddings": False,
    },
    "dense layer of other sizes": {
        "dense_layers": [1],
        "dense_intermediate_size": 96,
        "dense_num_attention_heads": 8,
        "dense_num_key_value_heads": 4,
    },
}
MODELS = {**tiny.CONFIGS, **{name: BamConfig(**{**tiny.SIZES, **more}) for name, more in MIXTURES.items()}}


def build(name: str) -> PreTrainedModel:
    config = MODELS[name]
    return BamForCausalLM(config) if isinstance(config, BamConfig) else tiny.dense(name, 0)


@pytest.mark.parametrize("name", MODELS)
def test_each_matrix_element_that_a_token_uses_costs_two_operations(name: str) -> None:
    model = build(name)
    matrices = count_parameters(model)[1]
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "norm" in parameter_name:
            matrices -= parameter.numel()
    if not model.config.tie_word_embeddings:
        embedding = model.get_input_embeddings()
        table = embedding.experts if isinstance(embedding, BamInputEmbeddings) else embedding
        matrices -= table.weight.numel()  # looked up, not multiplied
    config = copy.deepcopy(model.config)
    config.sliding_window = config.layer_types = None
    one_token = forward_flops_per_token(config, 2) - forward_flops_per_token(config, 1)
    without_keys = forward_flops_per_token(config, 2) - 2 * one_token  # a context of L costs its products and L/2 keys
    assert without_keys == 2 * matrices


def test_vectors_of_domains_are_counted() -> None:
    dense = tiny.CONFIGS["llama"]
    config = DomainVectorsConfig(dense, num_experts=3)
    more = count_parameters(DomainVectorsForCausalLM(config))[0] - count_parameters(tiny.dense("llama", 0))[0]
    assert more == 3 * (2 * 32 + 96)
    assert forward_flops_per_token(config, 8) == forward_flops_per_token(dense, 8) + 2 * more


def test_a_window_has_fewer_keys() -> None:
    sizes = {**tiny.SIZES, "num_hidden_layers": 1}
    full = forward_flops_per_token(BamConfig(**sizes), 100)
    one_layer = BamConfig(**sizes, sliding_window=10)
    heads = 4 * 4 * 8  # experts, heads, head_dim
    seen = sum(min(position, 10) for position in range(101)) / 100
    assert full - forward_flops_per_token(one_layer, 100) == pytest.approx(4 * heads * (50 - seen), rel=0.02)
    assert forward_flops_per_token(one_layer, 10) == forward_flops_per_token(BamConfig(**sizes), 10)
    assert training_flops(one_layer, 10, 7) == 21 * forward_flops_per_token(one_layer, 10)
