"""Floating-point operations of a model, by its configuration: two for each multiply-add of a matrix product.

Forward, a token and layer, with hidden size d, query width q, key/value width c, FFN hidden f in m matrices (3 where it
is gated, else 2), K keys seen on average, k FFN experts a token, s the hidden size of an always-on expert, and A
attention experts (C of them with own keys and values): `2(A·2dq + C·2dc + m·d(k·f + s) + routers) + 4·A·K·q`. Causal
attention over a context of L sees L/2 keys on average, through a window of w < L tokens w - w²/2L. Training is three
times the forward pass. Choices that a capacity drops are counted like the others.
"""

import re

from transformers import PreTrainedConfig

from bam_ray.model import is_mixture


def forward_flops_per_token(config: PreTrainedConfig, context: int) -> float:
    """Operations of one forward pass, a token, averaged over a sequence of `context` tokens."""
    layers = range(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    flops: float = 2.0 * config.vocab_size * config.hidden_size
    for layer, kind in zip(layers, kinds, strict=True):
        window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
        reach = min(context, window or context)
        flops += _layer(config, layer, reach - reach * reach / (2 * context))
    return flops


def _layer(config: PreTrainedConfig, layer: int, keys: float) -> float:
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    matrices = 3 if getattr(config, "mlp_gated", config.model_type != "gpt_neox") else 2
    attention, own_keys, routed, routers = 1, 1, f, 0
    if is_mixture(config) and layer in (config.dense_layers or ()):
        routed = config.dense_intermediate_size or f
        heads = config.dense_num_attention_heads or heads
        kv_heads = config.dense_num_key_value_heads or kv_heads
    elif is_mixture(config):
        routed = config.num_experts_per_tok * f + (config.shared_expert_intermediate_size or 0)
        routers = 1
        if config.attention_experts != "averaged":
            attention, routers = config.num_experts, 2
            own_keys = 1 if config.attention_experts == "kv_shared" else attention
        routers *= config.num_experts
    q, c = heads * head_dim, kv_heads * head_dim
    products = attention * 2 * d * q + own_keys * 2 * d * c + matrices * d * routed + routers * d
    return float(2 * products + 4 * attention * keys * q)


def training_flops(config: PreTrainedConfig, context: int, tokens: int) -> float:
    """Operations of training on `tokens` tokens: forward and twice that backward."""
    return 3.0 * forward_flops_per_token(config, context) * tokens


PEAK_BF16_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,  # before H100
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
}
"""Dense tensor-core peaks by words of the device's name (vendors' data sheets, SXM forms)."""


def peak_flops(device: str) -> float | None:
    """The device's bf16 peak in operations a second (for fp32 runs too: it is what the device could do), None where it
    is not known."""
    words = set(re.split(r"[ -]", device))
    return next((peak * 1e12 for name, peak in PEAK_BF16_TFLOPS.items() if words.issuperset(name.split())), None)
