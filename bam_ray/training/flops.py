"""Floating-point operations of a model, by its configuration: two for each multiply-add of a matrix product.

Forward, a token and layer, with hidden size d, query width q, key/value width c, FFN hidden f, context L (causal, so
L/2 keys on average), k FFN experts a token and A attention experts (C of them with own keys and values):
`2(A·2dq + C·2dc + k·3df + routers) + A·2Lq` (2df where the FFN has no gate). Training is three times the forward pass.
"""

import re

from transformers import PreTrainedConfig


def forward_flops_per_token(config: PreTrainedConfig, context: int) -> float:
    """Operations of one forward pass, a token, averaged over a sequence of `context` tokens."""
    d, f = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or d // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    q, c = config.num_attention_heads * head_dim, kv_heads * head_dim
    experts, top_k, attention, own_keys, routers = 1, 1, 1, 1, 0
    if config.model_type == "bam":
        experts, top_k = config.num_experts, config.num_experts_per_tok
        routers = 1
        if config.attention_experts != "averaged":
            attention, routers = experts, 2
            own_keys = 1 if config.attention_experts == "kv_shared" else experts
    matrices = 3 if getattr(config, "mlp_gated", config.model_type != "gpt_neox") else 2
    layer = 2 * (attention * 2 * d * q + own_keys * 2 * d * c + top_k * matrices * d * f + routers * experts * d)
    layer += attention * 2 * context * q
    return float(config.num_hidden_layers * layer + 2 * config.vocab_size * d)


def training_flops(config: PreTrainedConfig, context: int, tokens: int) -> float:
    """Operations of training on `tokens` tokens: forward and twice that backward."""
    return 3.0 * forward_flops_per_token(config, context) * tokens


PEAK_BF16_TFLOPS = {"GH200": 989, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70}
"""Dense tensor-core peaks by a word of the device's name (vendors' data sheets, SXM forms)."""


def peak_flops(device: str) -> float | None:
    """The device's bf16 peak in operations a second (for fp32 runs too: it is what the device could do), None where it
    is not known."""
    words = re.split(r"[ -]", device)
    return next((peak * 1e12 for name, peak in PEAK_BF16_TFLOPS.items() if name in words), None)
