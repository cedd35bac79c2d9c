"""Cohere (Command-R): parallel block, LayerNorm without bias, interleaved RoPE, logit scale. The paper's block."""

from typing import Any

from bam_ray.families.family import LLAMA_LAYOUT, Family, sizes


def _configure(config: dict[str, Any]) -> dict[str, Any]:
    return {
        **sizes(config),
        "parallel_block": True,
        "norm_type": "layernorm",
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "rope_interleaved": True,
        "logit_scale": config.get("logit_scale", 0.0625),
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
    }


COHERE = Family("cohere", LLAMA_LAYOUT, _configure, refused={"attention_bias": False, "use_qk_norm": False})
