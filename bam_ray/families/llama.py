"""Llama, SmolLM, TinyLlama: sequential block, RMSNorm, half-rotated RoPE.

Most families share its names, and so does the mixture.
"""

from typing import Any

from bam_ray.families.family import Family, ParameterTemplate, Role
from bam_ray.families.names import PLAIN_NAMES

# The names are those of the mixture, which has them from Llama; q_norm and k_norm come from Cohere and Qwen3
PARALLEL_LAYOUT = tuple(
    ParameterTemplate(PLAIN_NAMES[role], role)
    for role in (
        Role.EMBEDDING,
        Role.INPUT_NORM,
        Role.QUERY,
        Role.QUERY_BIAS,
        Role.KEY,
        Role.KEY_BIAS,
        Role.VALUE,
        Role.VALUE_BIAS,
        Role.OUTPUT,
        Role.OUTPUT_BIAS,
        Role.QUERY_NORM,
        Role.KEY_NORM,
        Role.GATE,
        Role.GATE_BIAS,
        Role.UP,
        Role.UP_BIAS,
        Role.DOWN,
        Role.DOWN_BIAS,
        Role.FINAL_NORM,
        Role.HEAD,
    )
)
_POST_ATTENTION = ParameterTemplate(PLAIN_NAMES[Role.POST_ATTENTION_NORM], Role.POST_ATTENTION_NORM)
LLAMA_LAYOUT = (*PARALLEL_LAYOUT[:-2], _POST_ATTENTION, *PARALLEL_LAYOUT[-2:])


def llama_block(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a sequential block with RMSNorm before attention and FFN."""
    bias = config.get("attention_bias", False)
    return {
        "parallel_block": False,
        "norm_type": "rmsnorm",
        "norm_eps": config["rms_norm_eps"],
        "rope_interleaved": False,
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": config.get("mlp_bias", False),
    }


LLAMA = Family("llama", LLAMA_LAYOUT, llama_block)
