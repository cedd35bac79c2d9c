"""Mistral: Llama's block with one sliding window for all layers, which models since v0.2 do not have."""

from typing import Any

from bam_ray.families.family import Family
from bam_ray.families.llama import LLAMA_LAYOUT, llama_block


def _block(config: dict[str, Any]) -> dict[str, Any]:
    return {**llama_block(config), "sliding_window": config["sliding_window"]}


MISTRAL = Family("mistral", LLAMA_LAYOUT, _block, required_values={"layer_types": None})
