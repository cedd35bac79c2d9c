"""`torch.compile` sees a whole layer as one graph: nothing in it depends on where tokens go."""

from typing import Any

import pytest
import torch

from bam_ray.model import BamConfig
from bam_ray.model.attention_bam import BamRotaryEmbedding
from bam_ray.model.modeling_bam import BamDecoderLayer
from tests.support import tiny

CASES: dict[str, dict[str, Any]] = {
    "bam": {},
    "all features": {
        "attention_experts": "kv_shared",
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 16,
        "qk_norm": "per_head",
        "norm_bias": True,
        "mlp_gated": False,
        "mlp_bias": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}


# aot_eager traces forward and backward as inductor does and leaves out the C++ compiler, which takes minutes
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_compiles_to_one_graph_and_computes_the_same(case: str, training: bool, backend: str) -> None:
    torch.manual_seed(0)
    config = BamConfig(**{**tiny.SIZES, **CASES[case]}, attn_implementation="sdpa")
    layer = BamDecoderLayer(config, 0).train(training)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    positions = BamRotaryEmbedding(config)(torch.empty(0), torch.arange(9)[None])
    torch._dynamo.reset()
    results = []
    for forward in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(training)
        with torch.set_grad_enabled(training):
            out, logits, attention_logits = forward(x, position_embeddings=positions, attention_mask=None, cache=None)
        result = {"out": out, "logits": logits, "attention": attention_logits}
        if training:
            layer.zero_grad()
            (out.square().sum() + logits.sum()).backward()
            result |= {"x": x.grad, **{name: each.grad.clone() for name, each in layer.named_parameters()}}
        results.append(result)
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)
