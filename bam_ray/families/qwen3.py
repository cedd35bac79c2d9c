"""Qwen3: Qwen2's block without biases, and with queries and keys normalized per head."""

from typing import Any

from bam_ray.families.family import Family
from bam_ray.families.llama import LLAMA_LAYOUT
from bam_ray.families.qwen2 import qwen_block


def _block(config: dict[str, Any]) -> dict[str, Any]:
    return {**qwen_block(config), "qk_norm": "shared"}


QWEN3 = Family("qwen3", LLAMA_LAYOUT, _block)
