"""Cohere2 (Command-R7B, Command A): Cohere's block with two kinds of layers.

Layers with sliding-window attention use RoPE, and layers with full attention use no positional encoding.
"""

from typing import Any

from bam_ray.families.cohere import cohere_block
from bam_ray.families.family import Family
from bam_ray.families.llama import PARALLEL_LAYOUT


def _block(config: dict[str, Any]) -> dict[str, Any]:
    kinds = config["layer_types"]
    return {
        **cohere_block(config),
        "layer_types": kinds,
        "sliding_window": config["sliding_window"],
        "nope_layers": [layer for layer, kind in enumerate(kinds) if kind == "full_attention"],
    }


COHERE2 = Family("cohere2", PARALLEL_LAYOUT, _block)
