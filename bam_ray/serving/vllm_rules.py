"""The mixtures that vLLM's Transformers backend computes correctly.

The rules were read from vLLM 0.32. Other mixtures would fail there without a reason, or be computed wrongly.
"""

from transformers import PreTrainedConfig

from bam_ray.errors import ServingError
from bam_ray.model import BamConfig

SILU = ("silu", "swish")


def check_vllm(config: PreTrainedConfig) -> None:
    """Raise `ServingError`, which names the setting, if vLLM cannot compute the model. Dense models pass."""
    if not isinstance(config, BamConfig):
        return
    for unsupported, what in (
        (config.embeddings == "experts", "embedding experts, and vLLM has an output head of its own"),
        (config.router_input == "prefix", "routers that read the prefix, and vLLM has no state for routers"),
        (config.router_prior != "none", f"a router prior ({config.router_prior}), and vLLM has no state for routers"),
        (config.hidden_act not in SILU, f"experts with {config.hidden_act}, and those of vLLM have SiLU"),
        (not config.mlp_gated, "experts without a gate, and those of vLLM have one"),
        (config.mlp_bias, "experts with biases, and those of vLLM have none"),
        (_has_other_heads(config), f"dense layers {config.dense_layers} with other numbers of heads than the others"),
    ):
        if unsupported:
            raise ServingError(f"vLLM cannot serve this mixture: it has {what}: set serve.engine to bam")


def _has_other_heads(config: BamConfig) -> bool:
    """Return True if an attention backend sees other numbers of heads in dense layers than in those with experts."""
    dense = (
        config.dense_num_attention_heads or config.expert_num_attention_heads,
        config.dense_num_key_value_heads or config.expert_num_key_value_heads,
    )
    return bool(config.dense_layers) and dense != (config.num_attention_heads, config.num_key_value_heads)
