"""GPT-NeoX (Pythia): FFN without gate, biases on all layers, LayerNorm with bias, partial RoPE, fused query-key-value.

The rows of `query_key_value` are [heads, 3, head_dim]: the query, key and value of each head are adjacent.
"""

from collections.abc import Callable
from typing import Any

from bam_ray.families.family import Family, ParameterTemplate, Role, RowRanges

LAYER = "gpt_neox.layers.{layer}."


def _block(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "num_key_value_heads": heads,
        "head_dim": config["hidden_size"] // heads,
        "parallel_block": config["use_parallel_residual"],
        "separate_ffn_norm": config["use_parallel_residual"],
        "norm_type": "layernorm",
        "norm_bias": True,
        "norm_eps": config["layer_norm_eps"],
        "rope_interleaved": False,
        "attention_bias": config["attention_bias"],
        "attention_output_bias": config["attention_bias"],
        "mlp_gated": False,
        "mlp_bias": True,
    }


def _fused_rows(number: int) -> Callable[[dict[str, Any]], RowRanges]:
    """Return the function that gives the rows of all heads' queries (0), keys (1) or values (2)."""

    def rows(config: dict[str, Any]) -> RowRanges:
        heads = config["num_attention_heads"]
        width = config["hidden_size"] // heads
        return [((3 * head + number) * width, (3 * head + number + 1) * width) for head in range(heads)]

    return rows


GPT_NEOX = Family(
    "gpt_neox",
    (
        ParameterTemplate("gpt_neox.embed_in.weight", Role.EMBEDDING),
        ParameterTemplate(LAYER + "input_layernorm.weight", Role.INPUT_NORM),
        ParameterTemplate(LAYER + "input_layernorm.bias", Role.INPUT_NORM_BIAS),
        ParameterTemplate(LAYER + "post_attention_layernorm.weight", Role.POST_ATTENTION_NORM),
        ParameterTemplate(LAYER + "post_attention_layernorm.bias", Role.POST_ATTENTION_NORM_BIAS),
        ParameterTemplate(LAYER + "attention.query_key_value.weight", Role.QUERY, _fused_rows(0)),
        ParameterTemplate(LAYER + "attention.query_key_value.weight", Role.KEY, _fused_rows(1)),
        ParameterTemplate(LAYER + "attention.query_key_value.weight", Role.VALUE, _fused_rows(2)),
        ParameterTemplate(LAYER + "attention.query_key_value.bias", Role.QUERY_BIAS, _fused_rows(0)),
        ParameterTemplate(LAYER + "attention.query_key_value.bias", Role.KEY_BIAS, _fused_rows(1)),
        ParameterTemplate(LAYER + "attention.query_key_value.bias", Role.VALUE_BIAS, _fused_rows(2)),
        ParameterTemplate(LAYER + "attention.dense.weight", Role.OUTPUT),
        ParameterTemplate(LAYER + "attention.dense.bias", Role.OUTPUT_BIAS),
        ParameterTemplate(LAYER + "mlp.dense_h_to_4h.weight", Role.UP),
        ParameterTemplate(LAYER + "mlp.dense_h_to_4h.bias", Role.UP_BIAS),
        ParameterTemplate(LAYER + "mlp.dense_4h_to_h.weight", Role.DOWN),
        ParameterTemplate(LAYER + "mlp.dense_4h_to_h.bias", Role.DOWN_BIAS),
        ParameterTemplate("gpt_neox.final_layer_norm.weight", Role.FINAL_NORM),
        ParameterTemplate("gpt_neox.final_layer_norm.bias", Role.FINAL_NORM_BIAS),
        ParameterTemplate("embed_out.weight", Role.HEAD),
    ),
    _block,
    required_values={"hidden_dropout": 0.0},
    ignored_tensors=(
        "gpt_neox.layers.*.attention.bias",
        "gpt_neox.layers.*.attention.masked_bias",
    ),
    partial_rotary=True,
)
