"""The configuration of a BAM mixture: the dense model it came from, and how its experts are routed."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

ATTENTION_EXPERTS = ("kv_experts", "kv_shared", "averaged")
NORM_TYPES = ("layernorm", "rmsnorm")
NORM_PLACEMENTS = ("before", "after")
QK_NORMS = (None, "shared", "per_head", "full")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# transformers' names of the activations that the experts compute, and torch's: a function and, for GELU, its kind
ACTIVATIONS = {
    "silu": ("silu", "none"),
    "swish": ("silu", "none"),
    "relu": ("relu", "none"),
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_fast": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
}


@strict
class BamConfig(PreTrainedConfig):
    r"""
    Sizes are those of one expert (`num_attention_heads`, `intermediate_size`, ...), which is one dense model's unless
    experts are slices of it.

    The mixture:

    num_experts (`int`): N, the FFN experts of every layer, and its attention experts where it has them.
    num_experts_per_tok (`int`): k, the FFN experts a token meets (BAM: 1, BTX: 2).
    norm_topk_prob (`bool`): False keeps the softmax over all N as it is (BAM); True makes the k chosen sum to 1 (BTX).
    noisy_gate (`bool`): the FFN's router logits get noise of a learned size in training (LLaMA-MoE, arXiv 1701.06538).
    selection_bias (`bool`): a bias an expert is added to its probability when experts are chosen, and only then; it is
        a buffer, moved by training without gradients (arXiv 2408.15664).
    capacity_factor (`float`, *optional*): in training, an FFN expert takes at most `⌈capacity_factor · k · L / N⌉` of a
        sequence's L tokens, and drops the choices past that (`routing_bam.within_capacity`). None: drops none.
    ffn_output_scale (`float`): factor on the routed FFN output (LLaMA-MoE's scale factor).
    attention_experts (`str`): "kv_experts" (q, k, v, o per expert), "kv_shared" (q and o per expert, one mean k and v),
        "averaged" (one attention, the mean of all: BTX).
    num_attention_experts_per_tok (`int`): 0 is soft routing over all attention experts; 1 and 2 are the paper's
        ablations, kept as they are, without renormalisation.
    attention_output_scale (`float`): factor on the sum over attention experts (N where they are slices of one
        attention: soft gates sum to 1, slices to the whole).
    shared_expert_intermediate_size (`int`, *optional*): hidden size of an always-on FFN beside the routed ones.
    dense_layers (`list[int]`, *optional*): layers without experts and routers: one attention and one FFN, of the
        sizes `dense_intermediate_size`, `dense_num_attention_heads`, `dense_num_key_value_heads` (None: an expert's).
    router_aux_loss_coef, router_z_loss_coef (`float`): added to the training loss, summed over layers.
    expert_names (`list[str]`): what each expert was before: "seed" and the domains, in the order of the experts.
    seed_config (`dict`, *optional*): the seed's `config.json` as it was: the way back to a dense model.

    The block, as the dense family has it:

    parallel_block (`bool`): `x + attention(norm(x)) + ffn(norm(x))` (Cohere) instead of one after the other (Llama).
    separate_ffn_norm (`bool`): in a parallel block, the FFN has a norm of its own (GPT-NeoX).
    norm_placement (`str`): "before" attention and FFN, or "after" them, before the residual is added (OLMo2).
    norm_type (`str`): "layernorm" or "rmsnorm"; norm_bias (`bool`): whether norms have a bias (GPT-NeoX).
    qk_norm (`str`, *optional*): norms of queries and keys: over each head with one weight [h] for all ("shared":
        Qwen3) or a weight [heads, h] ("per_head": Cohere), or over all heads together ("full": OLMo2).
    attention_bias, attention_output_bias, mlp_bias (`bool`): biases of q, k and v; of o; of the FFN.
    mlp_gated (`bool`): `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` (GPT-NeoX).
    hidden_act (`str`): one of `ACTIVATIONS`.
    layer_types (`list[str]`, *optional*): "full_attention" or "sliding_attention" of every layer; all sliding where
        `sliding_window` is given and this is not.
    nope_layers (`list[int]`, *optional*): layers without rotary positions (Cohere2's full attention).
    rope_parameters (`dict`): transformers' layout, of one of `ROPE_TYPES`, `partial_rotary_factor` included.
    rope_interleaved (`bool`): rotate neighbouring elements (Cohere) instead of the two halves (Llama).
    logit_scale (`float`): factor on the output logits (Cohere).
    """

    model_type = "bam"
    default_theta = 10000.0

    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    mlp_gated: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: str | None = None
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    norm_type: str = "layernorm"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    norm_placement: str = "before"
    parallel_block: bool = True
    separate_ffn_norm: bool = False
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    nope_layers: list[int] | None = None
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
    noisy_gate: bool = False
    selection_bias: bool = False
    capacity_factor: float | None = None
    ffn_output_scale: float = 1.0
    attention_experts: str = "kv_experts"
    num_attention_experts_per_tok: int = 0
    attention_output_scale: float = 1.0
    shared_expert_intermediate_size: int | None = None
    dense_layers: list[int] | None = None
    dense_intermediate_size: int | None = None
    dense_num_attention_heads: int | None = None
    dense_num_key_value_heads: int | None = None
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    output_router_logits: bool = False
    expert_names: list[str] | None = None
    seed_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        for key, allowed in (
            ("attention_experts", ATTENTION_EXPERTS),
            ("norm_type", NORM_TYPES),
            ("norm_placement", NORM_PLACEMENTS),
            ("qk_norm", QK_NORMS),
            ("hidden_act", tuple(ACTIVATIONS)),
        ):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is {getattr(self, key)!r}: use one of {allowed}")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type is {rope_type!r}: use one of {ROPE_TYPES}")
        if self.norm_placement == "after" and self.parallel_block:
            raise ValueError("norm_placement 'after' needs parallel_block False")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has 'sliding_attention' but sliding_window is None")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}: use 1 to {self.num_experts}")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(
                f"capacity_factor is {self.capacity_factor}: use a number above 0, or None to drop nothing"
            )
        if self.expert_names is not None and len(self.expert_names) != self.num_experts:
            raise ValueError(f"expert_names has {len(self.expert_names)} names for {self.num_experts} experts")
        if not set(self.dense_layers or ()) <= set(range(self.num_hidden_layers)):
            raise ValueError(f"dense_layers is {self.dense_layers}: use layers 0 to {self.num_hidden_layers - 1}")

    @property
    def mixture_layers(self) -> list[int]:
        """The layers that have experts, ascending: those whose router logits a forward pass returns."""
        return [layer for layer in range(self.num_hidden_layers) if layer not in (self.dense_layers or ())]
