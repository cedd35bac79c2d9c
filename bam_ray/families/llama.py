"""Llama: sequential block, RMSNorm, half-rotated RoPE."""

from typing import Any

from bam_ray.families.family import LAYER, LLAMA_LAYOUT, Family, Role, Weight, sizes


def _configure(config: dict[str, Any]) -> dict[str, Any]:
    return {
        **sizes(config),
        "parallel_block": False,
        "norm_type": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_interleaved": False,
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


LLAMA = Family(
    "llama",
    (*LLAMA_LAYOUT, Weight(LAYER + "post_attention_layernorm.weight", Role.NORM)),
    _configure,
    refused={"attention_bias": False, "mlp_bias": False},
)
