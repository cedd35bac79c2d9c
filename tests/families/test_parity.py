"""A mixture of identical experts, filled only from a family's table, equals the dense model of the family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Cohere2Config,
    CohereConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from bam_ray.families import Family, Role, expert_name, family_of, plain_name
from bam_ray.model import BamConfig, BamForCausalLM
from tests.support import tiny

SIZES = {**tiny.SIZES, "num_hidden_layers": 3}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
VARIANTS: dict[str, PreTrainedConfig] = {
    **tiny.CONFIGS,
    "cohere, q and k norms": CohereConfig(**SIZES, use_qk_norm=True, attention_bias=True, rope_parameters=LINEAR),
    "cohere2, biases": Cohere2Config(**SIZES, **SLIDING, attention_bias=True, rope_parameters=YARN),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "llama, yarn": LlamaConfig(**SIZES, rope_parameters=YARN, hidden_act="gelu"),
    "mistral, full attention": MistralConfig(**SIZES, sliding_window=None, rope_parameters=LINEAR),
    "gpt_neox, sequential": GPTNeoXConfig(
        **SIZES, use_parallel_residual=False, rope_parameters={**LINEAR, "partial_rotary_factor": 0.5}
    ),
    "gpt_neox, no attention bias": GPTNeoXConfig(**SIZES, attention_bias=False, hidden_act="gelu_new"),
    "olmo2, biases": Olmo2Config(**SIZES, attention_bias=True, rope_parameters=YARN),
    "qwen2, yarn": Qwen2Config(**SIZES, rope_parameters=YARN, tie_word_embeddings=True),
    "qwen3, sliding": Qwen3Config(**SIZES, **SLIDING, use_sliding_window=True, head_dim=16, attention_bias=True),
}
EXPERTS = 3


@pytest.fixture(scope="module", params=VARIANTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Return the folder of a dense model, and its logits for `tiny.tokens()`."""
    model = tiny.dense(VARIANTS[request.param], 0)
    folder = tmp_path_factory.mktemp("dense")
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(tiny.tokens()).logits


def mixture(folder: Path, **settings: Any) -> BamForCausalLM:
    """Return a mixture of `EXPERTS` copies of the dense model in `folder`."""
    raw = json.loads((folder / "config.json").read_text())
    family = family_of(raw, str(folder))
    config = BamConfig(
        **{**family.convert_config(raw), "num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True},
        **settings,
    )
    torch.manual_seed(1)
    model = BamForCausalLM(config).eval()
    result = model.load_state_dict(weights(family, raw, load_file(folder / "model.safetensors"), config), strict=False)
    assert not result.unexpected_keys
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert [name for name in result.missing_keys if not name.endswith(".gate.weight")] == tied
    return model


def weights(family: Family, raw: dict[str, Any], dense: dict[str, Tensor], config: BamConfig) -> dict[str, Tensor]:
    assert sorted(family.tensor_names(raw)) == sorted(dense)
    found: dict[str, Tensor] = {}
    for parameter in family.parameters(raw):
        tensor = dense[parameter.name]
        if parameter.rows is not None:
            tensor = torch.cat([tensor[start:end] for start, end in parameter.rows])
        is_key_value = parameter.role in (Role.KEY, Role.VALUE, Role.KEY_BIAS, Role.VALUE_BIAS, Role.KEY_NORM)
        in_attention = is_key_value or parameter.role.startswith(("query", "output"))
        in_ffn = parameter.role.startswith(("gate", "up", "down"))
        mixed = parameter.layer in config.mixture_layers
        if mixed and (in_ffn or (in_attention and config.attention_experts != "averaged")):
            copies = 1 if is_key_value and config.attention_experts == "kv_shared" else EXPERTS
            name = expert_name(parameter.role, parameter.layer, config.mlp_gated)
            stacked = tensor.expand(copies, *tensor.shape)
            found[name] = torch.cat((found[name], stacked), 1) if name in found else stacked
        else:
            found[plain_name(parameter.role, parameter.layer)] = tensor
    return found


@pytest.mark.parametrize("attention", ["kv_experts", "kv_shared", "averaged"])
@torch.no_grad()
def test_identical_experts_equal_the_dense_model(saved: tuple[Path, Tensor], attention: str) -> None:
    model = mixture(saved[0], attention_experts=attention)
    torch.testing.assert_close(model(tiny.tokens()).logits, saved[1], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_dense_layers_equal_the_dense_model(saved: tuple[Path, Tensor]) -> None:
    layers = json.loads((saved[0] / "config.json").read_text())["num_hidden_layers"]
    model = mixture(saved[0], dense_layers=list(range(layers)))
    out = model(tiny.tokens(), output_router_logits=True)
    torch.testing.assert_close(out.logits, saved[1], atol=2e-5, rtol=1e-5)
    assert out.router_logits == out.attention_router_logits == ()


@torch.no_grad()
def test_caches_padding_and_backends_do_not_change_logits(saved: tuple[Path, Tensor]) -> None:
    """The text is longer than a sliding window: 17 tokens and 6 generated ones, windows of 5."""
    model = mixture(saved[0], dense_layers=[1])
    ids = tiny.tokens()
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert torch.equal(model(greedy).logits[:, 16:-1].argmax(-1), greedy[:, 17:])
    static = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=-1, cache_implementation="static")
    assert torch.equal(greedy, static)
    for left in (3, 0):
        padded = torch.nn.functional.pad(ids, (left, 3 - left))
        mask = torch.zeros_like(padded)
        mask[:, left : left + 17] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, left : left + 17]
        torch.testing.assert_close(logits, saved[1], atol=2e-5, rtol=1e-5)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, saved[1], atol=2e-5, rtol=1e-5)
