"""Routing of all tokens to one expert."""

import pytest
import torch

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.one_expert import routed_to
from tests.support.tiny import SIZES

CHANGES: dict[str, dict[str, object]] = {
    "biased": {"selection_bias": True},
    "scaled": {"ffn_output_scale": 3.0, "attention_output_scale": 2.0},
    "embeddings": {"embeddings": "experts", "router_input": "prefix"},
    "btx": {"attention_experts": "averaged"},
}


PLAIN = {"selection_bias": False, "ffn_output_scale": 1.0, "attention_output_scale": 1.0}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_only_the_chosen_expert_is_used(name: str) -> None:
    """With one expert chosen, all others may have any weights, and gates are 1 whatever their scale in training."""
    torch.manual_seed(0)
    config = BamConfig(**{**SIZES, "num_experts": 3, "num_experts_per_tok": 2, **CHANGES[name]})
    model = BamForCausalLM(config).eval()
    for key, buffer in model.named_buffers():
        if key.endswith("selection_bias"):
            buffer.copy_(torch.tensor([9.0, 0.0, 9.0]))
    ids = torch.randint(2, 96, (2, 12))
    before = model(ids).logits
    with routed_to(model, 1):
        chosen = model(ids).logits
        with routed_to(model, 0):
            assert not torch.allclose(model(ids).logits, chosen)
        torch.testing.assert_close(model(ids).logits, chosen)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    assert not torch.allclose(before, chosen)

    plain = BamForCausalLM(BamConfig(**{**config.to_dict(), **PLAIN}))
    plain.load_state_dict(model.state_dict(), strict=False)
    for key, parameter in plain.eval().named_parameters():
        if "experts." in key:
            parameter[[0, 2]] = 0.5 * torch.randn_like(parameter[[0, 2]])
    with routed_to(plain, 1):
        torch.testing.assert_close(plain(ids).logits, chosen)
