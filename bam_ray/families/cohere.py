"""Cohere (Command-R): parallel block, LayerNorm without bias, interleaved RoPE, logit scale.

This is the block of the BAM paper (arXiv 2408.08274).
"""

from typing import Any

from bam_ray.families.family import Family
from bam_ray.families.llama import PARALLEL_LAYOUT


def cohere_block(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the parallel block."""
    return {
        "parallel_block": True,
        "norm_type": "layernorm",
        "norm_eps": config["layer_norm_eps"],
        "rope_interleaved": True,
        "attention_bias": config["attention_bias"],
        "attention_output_bias": config["attention_bias"],
        "logit_scale": config["logit_scale"],
    }


def _block(config: dict[str, Any]) -> dict[str, Any]:
    return {**cohere_block(config), "qk_norm": "per_head" if config["use_qk_norm"] else None}


COHERE = Family("cohere", PARALLEL_LAYOUT, _block)
