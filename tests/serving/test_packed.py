"""Weights in the layout of oneDNN."""

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.serving import DecodeEngine, SamplingParams
from bam_ray.serving.packed import can_pack, pack_weights
from tests.support.decoding import prompts_of, run
from tests.support.tiny import SIZES, dense, tokens

pytestmark = pytest.mark.skipif(not can_pack("cpu", torch.float32), reason="torch is built without oneDNN")

MIXTURES: dict[str, dict[str, Any]] = {
    "kv_experts": {"attention_experts": "kv_experts", "num_experts_per_tok": 2},
    "kv_shared": {"attention_experts": "kv_shared"},
    "averaged": {"attention_experts": "averaged", "num_experts_per_tok": 2, "parallel_block": False},
    "biases": {"mlp_bias": True, "attention_bias": True, "attention_output_bias": True, "mlp_gated": False},
    "norms and a shared expert": {"qk_norm": "per_head", "shared_expert_intermediate_size": 24},
}


def mixture(**more: Any) -> PreTrainedModel:
    """Return a random mixture of three experts, whose biases are random too."""
    torch.manual_seed(0)
    model = BamForCausalLM(BamConfig(**SIZES, num_experts=3, **more)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@torch.inference_mode()
def assert_packing_keeps_logits(model: PreTrainedModel) -> None:
    """Assert that packing changes logits by rounding errors only, for any number of tokens."""
    inputs = [tokens(batch, length) for batch, length in ((1, 1), (1, 3), (2, 17), (4, 40))]
    before = [model(ids).logits for ids in inputs]
    pack_weights(model)
    for ids, logits in zip(inputs, before, strict=True):
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_neox", "qwen3"])
def test_packed_dense_model_has_same_logits(family: str) -> None:
    assert_packing_keeps_logits(dense(family, 0))


@pytest.mark.parametrize("case", MIXTURES)
def test_packed_mixture_has_same_logits(case: str) -> None:
    assert_packing_keeps_logits(mixture(**MIXTURES[case]))


@pytest.mark.skipif(not can_pack("cpu", torch.bfloat16), reason="oneDNN has no bf16 on this processor")
@pytest.mark.parametrize("name", ["llama", "cohere", "gpt_neox", "qwen3", *MIXTURES])
@torch.inference_mode()
def test_packed_bf16_is_as_exact_as_plain_bf16(name: str) -> None:
    model = (mixture(**MIXTURES[name]) if name in MIXTURES else dense(name, 0)).bfloat16()
    exact = copy.deepcopy(model).float()
    inputs = [tokens(batch, length) for batch, length in ((1, 1), (1, 3), (2, 17), (4, 40))]
    expected = [exact(ids).logits for ids in inputs]
    plain = [model(ids).logits for ids in inputs]
    pack_weights(model)
    for ids, right, unpacked in zip(inputs, expected, plain, strict=True):
        logits = model(ids).logits
        assert logits.dtype is torch.bfloat16
        # The mean, because a router may choose other experts for single tokens
        assert (logits - right).abs().mean() < 1.5 * (unpacked - right).abs().mean()


def test_packed_weights_replace_the_original() -> None:
    model = mixture(**MIXTURES["kv_experts"])
    kept = {"embed_tokens", "norm", "gate", "input_layernorm", "post_attention_layernorm"}
    pack_weights(model)
    assert {name.split(".")[-2] for name, _ in model.named_parameters()} <= kept


@pytest.mark.parametrize("name", ["bam", "bam-shared", "bam-prefix", "llama"])
def test_packed_engine_generates_same_tokens(
    name: str, models_by_family: dict[str, PreTrainedModel], tokenizer: Any
) -> None:
    model = copy.deepcopy(models_by_family[name])

    def completions() -> list[tuple[int, ...]]:
        engine = DecodeEngine(model, tokenizer, slots=3, max_length=64)
        deltas = run(engine, prompts_of(5, 290), lambda _: SamplingParams(max_tokens=12, temperature=0))
        return [delta.tokens for delta in deltas]

    expected = completions()
    pack_weights(model)
    assert completions() == expected
