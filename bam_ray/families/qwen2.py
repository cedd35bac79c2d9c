"""Qwen2: Llama's block with biases only on query, key and value, and sliding windows on some layers."""

from typing import Any

from bam_ray.families.family import Family
from bam_ray.families.llama import LLAMA_LAYOUT, llama_block


def qwen_block(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of Llama's block with a type of attention per layer."""
    return {
        **llama_block(config),
        "layer_types": config["layer_types"],
        "sliding_window": config["sliding_window"],
    }


def _block(config: dict[str, Any]) -> dict[str, Any]:
    return {**qwen_block(config), "attention_bias": True}


QWEN2 = Family("qwen2", LLAMA_LAYOUT, _block)
