"""The names of the mixture's parameters, by role.

A plain parameter has no expert dimension: it is an average of all models, or it belongs to a dense layer. A stacked
parameter holds all experts.
"""

from bam_ray.families.family import Role

LAYER = "model.layers.{layer}."

PLAIN_NAMES = {
    Role.EMBEDDING: "model.embed_tokens.weight",
    Role.HEAD: "lm_head.weight",
    Role.FINAL_NORM: "model.norm.weight",
    Role.FINAL_NORM_BIAS: "model.norm.bias",
    Role.INPUT_NORM: LAYER + "input_layernorm.weight",
    Role.INPUT_NORM_BIAS: LAYER + "input_layernorm.bias",
    Role.POST_ATTENTION_NORM: LAYER + "post_attention_layernorm.weight",
    Role.POST_ATTENTION_NORM_BIAS: LAYER + "post_attention_layernorm.bias",
    Role.POST_FFN_NORM: LAYER + "post_feedforward_layernorm.weight",
    Role.QUERY: LAYER + "self_attn.q_proj.weight",
    Role.KEY: LAYER + "self_attn.k_proj.weight",
    Role.VALUE: LAYER + "self_attn.v_proj.weight",
    Role.OUTPUT: LAYER + "self_attn.o_proj.weight",
    Role.QUERY_BIAS: LAYER + "self_attn.q_proj.bias",
    Role.KEY_BIAS: LAYER + "self_attn.k_proj.bias",
    Role.VALUE_BIAS: LAYER + "self_attn.v_proj.bias",
    Role.OUTPUT_BIAS: LAYER + "self_attn.o_proj.bias",
    Role.QUERY_NORM: LAYER + "self_attn.q_norm.weight",
    Role.KEY_NORM: LAYER + "self_attn.k_norm.weight",
    Role.GATE: LAYER + "mlp.gate_proj.weight",
    Role.UP: LAYER + "mlp.up_proj.weight",
    Role.DOWN: LAYER + "mlp.down_proj.weight",
    Role.GATE_BIAS: LAYER + "mlp.gate_proj.bias",
    Role.UP_BIAS: LAYER + "mlp.up_proj.bias",
    Role.DOWN_BIAS: LAYER + "mlp.down_proj.bias",
}
STACKED_NAMES = {
    Role.EMBEDDING: "model.embed_tokens.experts.weight",
    Role.HEAD: "lm_head.experts.weight",
    Role.QUERY: LAYER + "self_attn.attention_experts.q_proj",
    Role.KEY: LAYER + "self_attn.attention_experts.k_proj",
    Role.VALUE: LAYER + "self_attn.attention_experts.v_proj",
    Role.OUTPUT: LAYER + "self_attn.attention_experts.o_proj",
    Role.QUERY_BIAS: LAYER + "self_attn.attention_experts.q_bias",
    Role.KEY_BIAS: LAYER + "self_attn.attention_experts.k_bias",
    Role.VALUE_BIAS: LAYER + "self_attn.attention_experts.v_bias",
    Role.OUTPUT_BIAS: LAYER + "self_attn.attention_experts.o_bias",
    Role.QUERY_NORM: LAYER + "self_attn.attention_experts.q_norm",
    Role.KEY_NORM: LAYER + "self_attn.attention_experts.k_norm",
    Role.GATE: LAYER + "mlp.experts.gate_up_proj",
    Role.UP: LAYER + "mlp.experts.gate_up_proj",
    Role.DOWN: LAYER + "mlp.experts.down_proj",
    Role.GATE_BIAS: LAYER + "mlp.experts.gate_up_bias",
    Role.UP_BIAS: LAYER + "mlp.experts.gate_up_bias",
    Role.DOWN_BIAS: LAYER + "mlp.experts.down_bias",
}
FFN_ROUTER = LAYER + "mlp.gate.weight"
ATTENTION_ROUTER = LAYER + "self_attn.gate.weight"
PRIOR_TOKENS, PRIOR_PAIRS = "model.prior.experts.tokens", "model.prior.experts.pairs"
"""The names of the counts of a router prior, [N, tokens] and [N, buckets]."""
EMBEDDING_ROUTERS = ("model.embed_tokens.gate.weight", "model.head.gate.weight")
"""The names of the routers, [N, d], of embedding experts at the input and at the output."""
FFN_ROLES = (Role.GATE, Role.UP, Role.DOWN, Role.GATE_BIAS, Role.UP_BIAS, Role.DOWN_BIAS)


def is_stacked(name: str) -> bool:
    """Return True if the parameter `name` of a mixture belongs to a module that holds experts."""
    return not {"experts", "attention_experts"}.isdisjoint(name.split("."))


def plain_name(role: Role, layer: int | None) -> str:
    """Return the name of a parameter without an expert dimension; `layer` is None for those outside of layers."""
    return PLAIN_NAMES[role].format(layer=layer)


def expert_name(role: Role, layer: int | None, gated: bool = True) -> str:
    """Return the name of the stacked parameter, [N or 1, ...], that holds a role of all experts.

    Gate and up share one parameter, in which the rows of the gate come first. If the FFN is not `gated`, the parameter
    holds only the up projection and has another name.
    """
    name = STACKED_NAMES[role].format(layer=layer)
    return name if gated else name.replace("gate_up_", "up_")


def shared_name(role: Role, layer: int) -> str:
    """Return the name of a parameter of the shared FFN expert; `role` is one of `FFN_ROLES`."""
    return plain_name(role, layer).replace(".mlp.", ".mlp.shared_expert.")


def router_names(layer: int) -> tuple[str, str]:
    """Return the names of the routers, [N, d], of the FFN experts and of the attention experts."""
    return FFN_ROUTER.format(layer=layer), ATTENTION_ROUTER.format(layer=layer)
