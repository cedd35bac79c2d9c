"""Floating-point operations of a model, computed from its configuration. A multiply-add counts as two operations.

The forward pass of one token through one layer takes `2(A·2dq + C·2dc + m·d(k·f + s) + routers) + 4·A·K·q` operations.
Here d is the hidden size, q the query width, c the key/value width, f the hidden size of an FFN expert, m the number of
FFN matrices (3 if the FFN is gated, else 2), K the mean number of keys that a query attends to, k the number of FFN
experts per token, s the hidden size of the shared expert, A the number of attention experts, and C the number of
attention experts with their own keys and values. Causal attention over a context of L tokens attends to L/2 keys on
average, and to w - w²/2L keys through a window of w < L tokens. The output head takes 2Vd operations; with N embedding
experts, it takes N times as many, and two routers take 2Nd each. Training takes three times the operations of the
forward pass. Choices that exceed an expert's capacity are counted too.
"""

import re
from collections.abc import Sequence
from copy import copy

from transformers import PreTrainedConfig

from bam_ray.model import is_mixture
from bam_ray.model.domain_vectors import DomainVectorsConfig
from bam_ray.settings import TrainingSettings


def forward_flops_per_token(config: PreTrainedConfig, context: int) -> float:
    """Return the operations per token of one forward pass, as a mean over a sequence of `context` tokens."""
    if isinstance(config, DomainVectorsConfig):
        dense = config.text_config
        vectors: int = config.num_experts * (2 * dense.hidden_size + dense.vocab_size)
        return forward_flops_per_token(dense, context) + 2.0 * vectors
    layers = range(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    flops: float = 2.0 * config.vocab_size * config.hidden_size
    if is_mixture(config) and config.embeddings == "experts":
        flops = config.num_experts * (flops + 4.0 * config.hidden_size)  # the head, and its router and the input's
    for layer, kind in zip(layers, kinds, strict=True):
        window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
        reach = min(context, window or context)
        flops += _layer(config, layer, reach - reach * reach / (2 * context))
    return flops


def _layer(config: PreTrainedConfig, layer: int, keys: float) -> float:
    d, f = config.hidden_size, config.intermediate_size
    of_expert = "expert_" if is_mixture(config) else ""
    heads = getattr(config, f"{of_expert}num_attention_heads")
    head_dim = getattr(config, "head_dim", None) or d // heads
    kv_heads = getattr(config, f"{of_expert}num_key_value_heads", None) or heads
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
    """Return the operations of training on `tokens` tokens: the forward pass, and twice that for the backward pass."""
    return 3.0 * forward_flops_per_token(config, context) * tokens


def run_flops(
    config: PreTrainedConfig, context: int, settings: TrainingSettings, expert_history: Sequence[tuple[int, int]]
) -> float:
    """Return the operations of a whole run, each step with the number of experts that the mixture had.

    Args:
        config: The configuration of the model at the end of the run.
        context: The length of the sequences.
        settings: The settings of the run.
        expert_history: (step, experts): up to `step` the mixture had only this number of experts.
    """
    flops, done = 0.0, 0
    for step, experts in (*expert_history, (settings.steps, None)):
        config_then = copy(config)
        if experts is not None:
            config_then.num_experts = experts
        flops += training_flops(config_then, context, (step - done) * settings.batch_tokens)
        done = step
    return flops


PEAK_BF16_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,  # this and the next one must come before H100
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
}
"""Dense tensor-core peaks by words in the device's name (from the vendors' data sheets, for the SXM variants)."""


def peak_flops(device: str) -> float | None:
    """Return the device's bf16 peak in operations per second, or None if it is not known.

    Runs in fp32 are compared with the same peak, because the device could reach it.
    """
    words = set(re.split(r"[ -]", device))
    return next((peak * 1e12 for name, peak in PEAK_BF16_TFLOPS.items() if words.issuperset(name.split())), None)
