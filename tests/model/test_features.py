"""Each feature of the block and of the mixture computes what its setting describes."""

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bam_ray.model.modeling_bam as modeling
from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.attention_bam import AveragedAttention, BamAttention
from bam_ray.model.configuration_bam import ACTIVATIONS, QK_NORMS
from bam_ray.model.experts_bam import expert_ffn
from tests.support import tiny

EVERYTHING: dict[str, Any] = {
    "attention_experts": "kv_shared",
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
    "qk_norm": "full",
    "norm_bias": True,
    "mlp_bias": True,
    "attention_bias": True,
    "attention_output_bias": True,
}


def build(**settings: Any) -> BamForCausalLM:
    """Return a random mixture, with random norms and biases."""
    torch.manual_seed(0)
    model = BamForCausalLM(BamConfig(**{**tiny.SIZES, "num_experts_per_tok": 2, **settings})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def positions(model: BamForCausalLM, x: Tensor) -> dict[str, Any]:
    cos_sin = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    return {"position_embeddings": cos_sin, "attention_mask": None, "cache": None}


def dense_attention(experts: torch.nn.Module, expert: int, config: BamConfig) -> AveragedAttention:
    """Return one attention expert as a dense attention."""
    attention = AveragedAttention(config, 0)
    for name, stacked in experts.named_parameters():
        parameter = stacked[expert if stacked.shape[0] > 1 else 0].detach()
        part, kind = name.split("_")
        at = f"{part}_norm.weight" if kind == "norm" else f"{part}_proj.{'bias' if kind == 'bias' else 'weight'}"
        attention.get_parameter(at).data.copy_(parameter)
    return attention


@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("attention", ["kv_experts", "kv_shared"])
@torch.no_grad()
def test_attention_experts_equal_a_weighted_sum_of_attentions(attention: str, qk_norm: str | None) -> None:
    model = build(
        **{**EVERYTHING, "attention_experts": attention, "qk_norm": qk_norm}, attention_output_scale=3.0, head_dim=16
    )
    layer: BamAttention = model.model.layers[0].self_attn
    x = torch.randn(2, 9, 32)
    pending, logits = layer(x, **positions(model, x))
    gates = 3.0 * logits.view(2, 9, 4).softmax(-1)
    experts = [dense_attention(layer.attention_experts, expert, model.config) for expert in range(4)]
    outputs = [expert(x, **positions(model, x))[0].result() for expert in experts]
    want = sum(gates[..., expert, None] * out for expert, out in enumerate(outputs))
    torch.testing.assert_close(pending.result(), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_scaled_slices_of_an_attention_equal_the_whole() -> None:
    whole = build(num_attention_heads=4, num_key_value_heads=2, dense_layers=[0, 1], num_experts=2)
    split = build(num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=2, attention_output_scale=2.0)
    dense, slices = whole.model.layers[0].self_attn, split.model.layers[0].self_attn
    slices.gate.weight.zero_()
    for part, width in (("q", 16), ("k", 8), ("v", 8)):
        weight = getattr(dense, f"{part}_proj").weight
        getattr(slices.attention_experts, f"{part}_proj").copy_(torch.stack(weight.split(width)))
    slices.attention_experts.o_proj.copy_(torch.stack(dense.o_proj.weight.split(16, dim=1)))
    x = torch.randn(2, 9, 32)
    want = dense(x, **positions(whole, x))[0].result()
    torch.testing.assert_close(slices(x, **positions(split, x))[0].result(), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_shared_expert_is_added_to_the_routed_experts() -> None:
    moe = build(shared_expert_intermediate_size=16, mlp_bias=True).model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    both, router = moe(x)
    shared, moe.shared_expert = moe.shared_expert, None
    want = F.linear(F.silu(shared.gate_proj(x)) * shared.up_proj(x), shared.down_proj.weight, shared.down_proj.bias)
    torch.testing.assert_close(both - moe(x)[0], want, atol=1e-5, rtol=1e-5)
    assert router.logits.shape == (10, 4)


def test_dense_layers_have_no_experts_and_their_own_sizes() -> None:
    settings: dict[str, Any] = {"num_hidden_layers": 3, "dense_layers": [0, 2], "head_dim": 8}
    model = build(**settings, dense_intermediate_size=96, dense_num_attention_heads=8, dense_num_key_value_heads=4)
    names = {name for name, _ in model.named_parameters()}
    assert {name.split(".")[2] for name in names if ".gate." in name or "experts." in name} == {"1"}
    dense = model.model.layers[0]
    assert dense.mlp.up_proj.weight.shape == (96, 32)
    assert (dense.self_attn.q_proj.out_features, dense.self_attn.k_proj.out_features) == (64, 32)
    out = model(tiny.tokens(), labels=tiny.tokens(), output_router_logits=True)
    assert [logits.shape for logits in out.router_logits] == [(34, 4)]
    assert [logits.shape for logits in out.attention_router_logits] == [(34, 4)]
    without = build(**{**settings, "dense_layers": [0, 1, 2]}).train()(tiny.tokens(), labels=tiny.tokens())
    assert without.load_balance_loss is None
    assert torch.equal(without.loss, without.nll)


def test_losses_exclude_padding() -> None:
    model = build().train()
    ids = tiny.tokens(2, 9)
    want = model(ids, labels=ids)
    padded, labels = F.pad(ids, (0, 4)), F.pad(ids, (0, 4), value=-100)
    mask = F.pad(torch.ones_like(ids), (0, 4))
    got = model(padded, attention_mask=mask, labels=labels)
    for loss in ("loss", "nll", "load_balance_loss", "router_z_loss"):
        torch.testing.assert_close(got[loss], want[loss], atol=1e-5, rtol=1e-5)
    unmasked = model(padded, labels=labels)
    assert not torch.allclose(unmasked.load_balance_loss, want.load_balance_loss, atol=1e-4)


@torch.no_grad()
def test_hidden_states_are_returned_between_layers() -> None:
    model = build()
    states = model(tiny.tokens(), output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert torch.equal(states[0], model.get_input_embeddings()(tiny.tokens()))
    torch.testing.assert_close(model.lm_head(states[2]), model(tiny.tokens()).logits)
    assert model(tiny.tokens()).hidden_states is None


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS.keys() - {"swish", "gelu_fast", "gelu_new"}))
@pytest.mark.parametrize("gated", [True, False])
def test_expert_gradients_equal_difference_quotients(activation: str, gated: bool, biased: bool) -> None:
    """The test runs in double precision; the third expert has no rows."""
    torch.manual_seed(0)
    d, f, counts = 3, 4, torch.tensor([2, 3, 0, 1])
    shapes = [(6, d), (4, (1 + gated) * f, d), (4, d, f), *([(4, (1 + gated) * f), (4, d)] if biased else [])]
    operands = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]

    def experts(rows: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        out: Tensor = expert_ffn(rows, counts, up, down, *(biases or (None, None)), activation)[0]
        return out

    assert torch.autograd.gradcheck(experts, operands)


def test_autocast_computes_in_bf16_with_fp32_gradients() -> None:
    model = build(**EVERYTHING).train()
    ids = tiny.tokens()
    model(ids, labels=ids).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids).loss.backward()
        experts = model.model.layers[0].mlp.experts
        assert experts.compute(torch.randn(5, 32), torch.tensor([3, 0, 0, 2])).dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert F.cosine_similarity(parameter.grad.flatten(), whole[name].flatten(), dim=0) > 0.9, name


def test_model_runs_with_bf16_weights() -> None:
    model = build(**EVERYTHING).to(torch.bfloat16)
    ids = tiny.tokens()
    assert model(ids, labels=ids).logits.dtype == torch.bfloat16
    for cache in ("dynamic", "static"):
        model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation=cache)


@pytest.mark.parametrize("attention", ["kv_experts", "averaged"])
@torch.no_grad()
def test_saving_and_loading_is_bit_identical(attention: str, tmp_path: Path) -> None:
    model = build(**{**EVERYTHING, "attention_experts": attention}, dense_layers=[1], seed_config={"a": [1]})
    model.save_pretrained(tmp_path)
    loaded = BamForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.seed_config == {"a": [1]}
    assert torch.equal(loaded(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_second_copy_of_the_code_works_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`trust_remote_code` loads such a copy, which registers its operators under other names."""
    package = tmp_path / "copied_mixture"
    package.mkdir()
    (package / "__init__.py").touch()
    folder = Path(modeling.__file__).parent
    for file in folder.glob("*_bam.py"):
        shutil.copy(file, package)
    monkeypatch.syspath_prepend(tmp_path)
    copied = importlib.import_module("copied_mixture.modeling_bam")
    monkeypatch.delitem(sys.modules, "copied_mixture")
    model = build()
    other = copied.BamForCausalLM(copied.BamConfig(**{**tiny.SIZES, "num_experts_per_tok": 2}))
    other.load_state_dict(model.state_dict())
    losses = []
    for each in (model, other.eval()):
        each(tiny.tokens(), labels=tiny.tokens()).loss.backward()
        losses.append(each.model.layers[0].mlp.experts.down_proj.grad)
    assert torch.equal(*losses)


def test_meta_device_propagates_shapes() -> None:
    with torch.device("meta"):
        layer = BamForCausalLM(BamConfig(**{**tiny.SIZES, **EVERYTHING})).train().model.layers[0].mlp
        out, router = layer(torch.empty(2, 9, 32))
    assert (out.shape, router.logits.shape) == ((2, 9, 32), (18, 4))
    out.sum().backward()
    assert layer.experts.gate_up_proj.grad.shape == (4, 96, 32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ({"qk_norm": "both"}, "qk_norm is 'both'"),
        ({"norm_placement": "after"}, "set parallel_block to False"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window is None"),
        ({"dense_layers": [2]}, "use layers 0 to 1"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'dynamic'"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BamConfig(**{**tiny.SIZES, **settings})
