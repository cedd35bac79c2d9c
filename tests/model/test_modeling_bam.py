"""The mixture works like a model of transformers, and computes the equations of the paper."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bam_ray.model import BamConfig, BamForCausalLM, RouterOutput, routing_losses
from bam_ray.model.configuration_bam import ATTENTION_EXPERTS
from tests.support import tiny


def build(attention: str, seed: int = 0, **more: Any) -> BamForCausalLM:
    torch.manual_seed(seed)
    settings = {**tiny.SIZES, "attention_experts": attention, "num_experts_per_tok": 2, **more}
    return BamForCausalLM(BamConfig(**settings)).eval()


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("attention", ATTENTION_EXPERTS)
@torch.no_grad()
def test_cache_padding_and_backends_give_the_same_logits(attention: str, parallel: bool) -> None:
    model = build(attention, parallel_block=parallel)
    ids = tiny.tokens(2, 12)
    whole = model(ids).logits
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert torch.equal(model(greedy).logits[:, 11:-1].argmax(-1), greedy[:, 12:])
    static = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=-1, cache_implementation="static")
    assert torch.equal(greedy, static)
    padded = F.pad(ids, (3, 0))
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    left = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(left, whole, atol=1e-5, rtol=1e-5)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION_EXPERTS)
def test_gradient_checkpointing_keeps_gradients(attention: str) -> None:
    tiny.assert_recomputation_keeps_gradients(build(attention).train(), tiny.tokens())


@pytest.mark.parametrize("attention", ["kv_experts", "kv_shared"])
@torch.no_grad()
def test_attention_equals_a_loop_over_experts_and_heads(attention: str) -> None:
    """The loop computes Σ g_i · W_o,i · softmax(q_i k_i / √h) v_i."""
    model = build(attention)
    layer = model.model.layers[0].self_attn
    experts = layer.attention_experts
    x = torch.randn(2, 9, 32)
    positions = torch.arange(9)[None]
    embeddings = model.model.rotary_emb(x, positions)
    cos, sin = embeddings
    pending, logits = layer(x, position_embeddings=embeddings, attention_mask=None, cache=None)
    got = pending.result()
    gates = logits.view(2, 9, 4).softmax(-1)

    def turn(vector: torch.Tensor) -> torch.Tensor:
        swapped = torch.stack((-vector[..., 1::2], vector[..., ::2]), -1).flatten(-2)
        return vector * cos + swapped * sin

    want = torch.zeros_like(x)
    causal = torch.full((9, 9), float("-inf")).triu(1)
    for i in range(4):
        shared = 0 if attention == "kv_shared" else i
        heads = []
        for head in range(4):
            rows, kv_rows = slice(head * 8, head * 8 + 8), slice(head // 2 * 8, head // 2 * 8 + 8)
            query = turn(x @ experts.q_proj[i, rows].T)
            key = turn(x @ experts.k_proj[shared, kv_rows].T)
            value = x @ experts.v_proj[shared, kv_rows].T
            heads.append((query @ key.transpose(1, 2) / 8**0.5 + causal).softmax(-1) @ value)
        want += gates[..., i : i + 1] * (torch.cat(heads, -1) @ experts.o_proj[i].T)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("top_k", "normalized"), [(1, False), (2, True), (4, False)])
@torch.no_grad()
def test_ffn_routing_equals_a_loop_over_tokens(top_k: int, normalized: bool) -> None:
    model = build("averaged", num_experts_per_tok=top_k, norm_topk_prob=normalized, ffn_output_scale=3.0)
    moe = model.model.layers[0].mlp
    x = torch.randn(1, 7, 32)
    got, router = moe(x)
    for token in range(7):
        probabilities = router.logits[token].softmax(-1)
        chosen = probabilities.topk(top_k).indices.tolist()
        total = sum(probabilities[i] for i in chosen) if normalized else 1.0
        want = torch.zeros(32)
        for i in chosen:
            gate, up = (moe.experts.gate_up_proj[i] @ x[0, token]).chunk(2)
            want += 3.0 * probabilities[i] / total * (moe.experts.down_proj[i] @ (F.silu(gate) * up))
        torch.testing.assert_close(got[0, token], want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_routing_losses_equal_their_formulas() -> None:
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    probabilities = logits.softmax(-1)
    losses = routing_losses([RouterOutput(logits)], 1)
    want = 2 * (0.75 * probabilities[:, 0].mean() + 0.25 * probabilities[:, 1].mean())
    torch.testing.assert_close(losses.load_balance, want)
    torch.testing.assert_close(losses.router_z, logits.logsumexp(-1).square().mean())
    balanced = routing_losses([RouterOutput(torch.eye(4) * 50)] * 3, 1)
    torch.testing.assert_close(balanced.load_balance, torch.tensor(3.0))  # 1 for each layer


def test_auxiliary_losses_are_added_in_training_only() -> None:
    model = build("kv_experts")
    ids = tiny.tokens()
    out = model(ids, labels=ids)
    assert torch.equal(out.loss, out.nll)
    out = model.train()(ids, labels=ids)
    want = out.nll + 0.01 * out.load_balance_loss + 0.001 * out.router_z_loss
    torch.testing.assert_close(out.loss, want)


@pytest.mark.parametrize(
    ("attention", "total", "active"),
    [("averaged", 700.5, 587.2), ("kv_shared", 738.3, None), ("kv_experts", 776.0, 662.7)],
)
def test_parameter_counts_equal_the_paper(attention: str, total: float, active: float | None) -> None:
    """The counts are those of the small shape in table 9, which are rounded to 0.1 million."""
    config = BamConfig(**SMALL, attention_experts=attention)
    with torch.device("meta"):
        model = BamForCausalLM(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == total
    if active is not None:
        idle = 6 * 3 * (3 * 1024 * 2048)  # three of the four experts of each layer are not used by a token
        routers = sum(parameter.numel() for name, parameter in model.named_parameters() if ".gate." in name)
        assert round((count - idle - routers) / 1e6, 1) == active  # the paper excludes routers


LARGE = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 18,
    "num_attention_heads": 18,
    "num_key_value_heads": 6,
    "head_dim": 128,
}
SMALL = {
    "vocab_size": 256_000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(("sizes", "millions"), [(SMALL, 587.2), (LARGE, 1991.3)])
def test_parameter_counts_equal_the_dense_seeds(sizes: dict[str, Any], millions: float) -> None:
    """A mixture whose layers are all dense has the parameters of the seed: 587.2M and 1.991B in the paper."""
    with torch.device("meta"):
        model = BamForCausalLM(BamConfig(**sizes, dense_layers=list(range(sizes["num_hidden_layers"]))))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


@pytest.mark.slow
def test_loads_without_this_package(tmp_path: Path) -> None:
    """`trust_remote_code` finds the model's code in the folder, in an interpreter that cannot import bam_ray."""
    model = build("kv_experts")
    model.save_pretrained(tmp_path)
    ids = tiny.tokens()
    with torch.no_grad():
        torch.save(model(ids).logits, tmp_path / "want.pt")
    torch.save(ids, tmp_path / "ids.pt")
    script = """
import sys
sys.modules["bam_ray"] = None
import torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
logits = model(torch.load(folder + "/ids.pt")).logits
torch.testing.assert_close(logits, torch.load(folder + "/want.pt"))
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
