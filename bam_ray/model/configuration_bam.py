"""The configuration of a BAM mixture: the dense model it came from, and how its experts are routed."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

ATTENTION_EXPERTS = ("kv_experts", "kv_shared", "averaged")


@strict
class BamConfig(PreTrainedConfig):
    r"""
    Sizes are those of one dense model (`num_attention_heads`, `intermediate_size`, ... are of one expert).

    num_experts (`int`): N, the FFN experts of every layer, and its attention experts where it has them.
    num_experts_per_tok (`int`): k, the FFN experts a token meets (BAM: 1, BTX: 2).
    norm_topk_prob (`bool`): False keeps the softmax over all N as it is (BAM); True makes the k chosen sum to 1 (BTX).
    ffn_output_scale (`float`): factor on the routed FFN output (LLaMA-MoE's scale factor).
    attention_experts (`str`): "kv_experts" (q, k, v, o per expert), "kv_shared" (q and o per expert, one mean k and v),
        "averaged" (one attention, the mean of all: BTX).
    num_attention_experts_per_tok (`int`): 0 is soft routing over all attention experts; 1 and 2 are the paper's
        ablations, kept as they are, without renormalisation.
    router_aux_loss_coef, router_z_loss_coef (`float`): added to the training loss, summed over layers.
    parallel_block (`bool`): `x + attention(norm(x)) + ffn(norm(x))` (Cohere) instead of one after the other (Llama).
    norm_type (`str`): "layernorm" (without bias: Cohere) or "rmsnorm" (Llama).
    rope_interleaved (`bool`): rotate neighbouring elements (Cohere) instead of the two halves (Llama).
    logit_scale (`float`): factor on the output logits (Cohere).
    expert_names (`list[str]`): what each expert was before: "seed" and the domains, in the order of the experts.
    """

    model_type = "bam"
    keys_to_ignore_at_inference = ("past_key_values",)
    default_theta = 10000.0

    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    norm_type: str = "layernorm"
    norm_eps: float = 1e-5
    parallel_block: bool = True
    rope_interleaved: bool = True
    rope_parameters: dict[str, Any] | None = None
    logit_scale: float = 1.0
    attention_dropout: float = 0.0
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    num_experts: int = 4
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = False
    ffn_output_scale: float = 1.0
    attention_experts: str = "kv_experts"
    num_attention_experts_per_tok: int = 0
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    output_router_logits: bool = False
    expert_names: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        if self.attention_experts not in ATTENTION_EXPERTS:
            raise ValueError(f"attention_experts is {self.attention_experts!r}: use one of {ATTENTION_EXPERTS}")
        if self.norm_type not in ("layernorm", "rmsnorm"):
            raise ValueError(f"norm_type is {self.norm_type!r}: use 'layernorm' or 'rmsnorm'")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}: use 1 to {self.num_experts}")
        if self.expert_names is not None and len(self.expert_names) != self.num_experts:
            raise ValueError(f"expert_names has {len(self.expert_names)} names for {self.num_experts} experts")
