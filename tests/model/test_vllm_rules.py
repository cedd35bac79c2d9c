"""The rules of vLLM's Transformers backend, restated from its source.

vLLM needs other versions of torch and transformers than this project. The rules hold for mixtures whose routers read
single tokens and whose embeddings are averaged: vLLM has an output head of its own and no state for routers.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bam_ray.model import BamConfig, BamForCausalLM, BamModel
from bam_ray.model.attention_bam import BamAttentionCall
from bam_ray.upcycling.write import AUTO_MAP
from tests.support.tiny import SIZES

MODES = ("kv_experts", "kv_shared", "averaged")
LENGTH = 6


def config_of(mode: str, **changes: Any) -> BamConfig:
    """Return the configuration of a mixture of three experts, as it is read from a folder."""
    made = BamConfig(**{**SIZES, "num_experts": 3, "num_experts_per_tok": 2, "attention_experts": mode, **changes})
    return BamConfig(**json.loads(made.to_json_string(use_diff=False)))


@pytest.fixture(params=MODES)
def config(request: pytest.FixtureRequest) -> BamConfig:
    """Return the configuration of each kind of mixture."""
    return config_of(request.param)


def attention_calls(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose `forward` calls transformers' attention interface, found as vLLM finds them."""
    return [module for module in model.modules() if calls_interface(type(module))]


def calls_interface(kind: type[nn.Module]) -> bool:
    """Return True if `forward` stores the interface in a variable and calls it once, with a literal or own scaling."""
    if kind.__module__.startswith("torch."):
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    names = {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    }
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]
    scaling = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "scaling"]
    own = [each for each in scaling if isinstance(each, ast.Constant) or ast.unparse(each).startswith("self.")]
    return len(calls) == 1 and len(own) == 1


def stacked_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what vLLM replaces by its own kernels: children named `experts` whose parameters are all 3-D."""
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        if name.rpartition(".")[2] == "experts" and parameters and all(each.ndim == 3 for each in parameters):
            yield name, module


def test_the_backend_accepts_the_base_model(config: BamConfig, tmp_path: Path) -> None:
    assert AUTO_MAP["AutoModel"] == "modeling_bam.BamModel"
    assert list(AUTO_MAP) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(model) is BamModel
    assert model.is_backend_compatible()


def test_each_layer_has_one_attention_call(config: BamConfig) -> None:
    calls = attention_calls(BamModel(config))
    assert [call.layer_idx for call in calls] == list(range(config.num_hidden_layers))
    for call in calls:
        assert isinstance(call, BamAttentionCall)
        assert call.config is not None
        assert call.is_causal
        assert not hasattr(call, "attn")  # vLLM sets this attribute


def test_only_ffn_experts_are_replaced(config: BamConfig) -> None:
    names = [name for name, _ in stacked_experts(BamModel(config))]
    assert names == [f"layers.{layer}.mlp.experts" for layer in range(config.num_hidden_layers)]


def test_weights_of_ffn_experts_have_vllm_s_layout(config: BamConfig) -> None:
    n, d, f = config.num_experts, config.hidden_size, config.intermediate_size
    for _, experts in stacked_experts(BamModel(config)):
        shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
        assert shapes == {"gate_up_proj": (n, 2 * f, d), "down_proj": (n, d, f)}


def test_the_backend_computes_the_same_logits(config: BamConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    whole = BamForCausalLM(config).eval()
    tokens = torch.randint(0, config.vocab_size, (1, LENGTH))
    with torch.no_grad():
        want = whole.model(input_ids=tokens).last_hidden_state[0]
    seen = []

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        """Attend like vLLM: without a mask, to a result of shape [T, heads·h]."""
        assert mask is None
        seen.append((module.layer_idx, query.shape[1], key.shape[1]))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs["scaling"])
        return out[0].transpose(0, 1).flatten(1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", attend)
    whole.config._attn_implementation = "vllm"
    for _, experts in stacked_experts(whole):
        replace_forward(experts)
    with torch.no_grad():
        out = whole.model(
            input_ids=tokens,
            inputs_embeds=None,
            use_cache=False,
            position_ids=torch.arange(LENGTH)[None],
            return_dict=False,
        )
    torch.testing.assert_close(out[0][0], want, atol=1e-5, rtol=1e-5)
    # vLLM sizes its cache and its kernels by these two settings
    heads = (config.num_attention_heads, config.num_key_value_heads)
    assert seen == [(layer, *heads) for layer in range(config.num_hidden_layers)]


def replace_forward(experts: Any) -> None:
    """Replace the experts' forward pass by one with vLLM's three positional parameters."""
    forward = experts.forward

    def runner(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = forward(hidden_states, top_k_index, top_k_weights)
        return out

    experts.forward = runner


@pytest.mark.parametrize(("mode", "heads", "keys"), [("kv_experts", 12, 6), ("kv_shared", 12, 2), ("averaged", 4, 2)])
def test_the_configuration_counts_all_heads(mode: str, heads: int, keys: int) -> None:
    config = config_of(mode, num_attention_heads=4, num_key_value_heads=2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, keys)
    assert (config.expert_num_attention_heads, config.expert_num_key_value_heads) == (4, 2)


def test_more_experts_have_more_heads() -> None:
    before = config_of("kv_experts", num_attention_heads=4, num_key_value_heads=2)
    after = BamConfig(**{**before.to_dict(), "num_experts": 5})
    assert (after.num_attention_heads, after.num_key_value_heads) == (20, 10)
