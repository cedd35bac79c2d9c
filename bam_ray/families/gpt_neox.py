"""GPT-NeoX (Pythia): plain FFN, biases everywhere, LayerNorm with bias, partial RoPE, and fused query, key and value.

Rows of `query_key_value` are [heads, 3, head_dim]: each head's query, key and value lie together.
"""

from collections.abc import Callable
from typing import Any

from bam_ray.families.family import Family, Role, Rows, Weight

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


def _part(number: int) -> Callable[[dict[str, Any]], Rows]:
    """Of each head, the rows of its query (0), key (1) or value (2)."""

    def rows(config: dict[str, Any]) -> Rows:
        heads = config["num_attention_heads"]
        width = config["hidden_size"] // heads
        return [((3 * head + number) * width, (3 * head + number + 1) * width) for head in range(heads)]

    return rows


GPT_NEOX = Family(
    "gpt_neox",
    (
        Weight("gpt_neox.embed_in.weight", Role.EMBEDDING),
        Weight(LAYER + "input_layernorm.weight", Role.INPUT_NORM),
        Weight(LAYER + "input_layernorm.bias", Role.INPUT_NORM_BIAS),
        Weight(LAYER + "post_attention_layernorm.weight", Role.POST_ATTENTION_NORM),
        Weight(LAYER + "post_attention_layernorm.bias", Role.POST_ATTENTION_NORM_BIAS),
        Weight(LAYER + "attention.query_key_value.weight", Role.QUERY, _part(0)),
        Weight(LAYER + "attention.query_key_value.weight", Role.KEY, _part(1)),
        Weight(LAYER + "attention.query_key_value.weight", Role.VALUE, _part(2)),
        Weight(LAYER + "attention.query_key_value.bias", Role.QUERY_BIAS, _part(0)),
        Weight(LAYER + "attention.query_key_value.bias", Role.KEY_BIAS, _part(1)),
        Weight(LAYER + "attention.query_key_value.bias", Role.VALUE_BIAS, _part(2)),
        Weight(LAYER + "attention.dense.weight", Role.OUTPUT),
        Weight(LAYER + "attention.dense.bias", Role.OUTPUT_BIAS),
        Weight(LAYER + "mlp.dense_h_to_4h.weight", Role.UP),
        Weight(LAYER + "mlp.dense_h_to_4h.bias", Role.UP_BIAS),
        Weight(LAYER + "mlp.dense_4h_to_h.weight", Role.DOWN),
        Weight(LAYER + "mlp.dense_4h_to_h.bias", Role.DOWN_BIAS),
        Weight("gpt_neox.final_layer_norm.weight", Role.FINAL_NORM),
        Weight("gpt_neox.final_layer_norm.bias", Role.FINAL_NORM_BIAS),
        Weight("embed_out.weight", Role.HEAD),
    ),
    _block,
    refused={"hidden_dropout": 0.0},
    ignored=(
        "gpt_neox.layers.*.attention.bias",
        "gpt_neox.layers.*.attention.masked_bias",
        "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
    ),
    partial_rotary=True,
)
