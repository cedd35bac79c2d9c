"""The configuration of a BAM mixture: the dense model it came from, and how its experts are routed."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

ATTENTION_EXPERTS = ("kv_experts", "kv_shared", "averaged")
EMBEDDINGS = ("averaged", "experts")
ROUTER_INPUTS = ("token", "prefix")
ROUTER_PRIORS = ("none", "bigram")
NORM_TYPES = ("layernorm", "rmsnorm")
NORM_PLACEMENTS = ("before", "after")
QK_NORMS = (None, "shared", "per_head", "full")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# The activations of the experts, by transformers' name: torch's function and, for GELU, its approximation.
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
    """The configuration of a mixture.

    Sizes such as `intermediate_size` are those of one expert, which are those of one dense model unless experts are
    slices of it. Heads are counted twice, because other libraries size caches and kernels by `num_attention_heads` and
    `num_key_value_heads`:

    num_attention_heads, num_key_value_heads (`int`): the heads of all attention experts of a layer together, which is
        how many an attention backend and a cache see. They are computed from the next two. If those are not given,
        they are the heads of one expert.
    expert_num_attention_heads, expert_num_key_value_heads (`int`): H and G, the heads of one expert.

    The mixture:

    num_experts (`int`): N, the number of FFN experts and, if there are any, of attention experts in each layer.
    num_experts_per_tok (`int`): k, the number of FFN experts that a token uses (BAM: 1, BTX: 2).
    norm_topk_prob (`bool`): False takes the weights from the softmax over all N experts (BAM); True makes the weights
        of the k selected experts sum to 1 (BTX).
    noisy_gate (`bool`): in training, the logits of the FFN router get noise of a learned scale (LLaMA-MoE, arXiv
        1701.06538).
    selection_bias (`bool`): each expert has a bias that is added to its probability when experts are selected, and only
        then. It is a buffer that training updates without gradients (arXiv 2408.15664).
    capacity_factor (`float`, *optional*): in training, an FFN expert processes at most
        `⌈capacity_factor · k · L / N⌉` of the L tokens of a sequence; choices beyond that are dropped
        (`routing_bam.within_capacity`). None: no choices are dropped.
    ffn_output_scale (`float`): factor on the routed FFN output (LLaMA-MoE's scale factor).
    attention_experts (`str`): "kv_experts" (q, k, v and o for each expert), "kv_shared" (q and o for each expert, and
        one averaged k and v), or "averaged" (one attention, the average of all: BTX).
    num_attention_experts_per_tok (`int`): 0 is soft routing over all attention experts. 1 and 2 are the paper's
        ablations: the other gates are set to 0 without renormalization.
    attention_output_scale (`float`): factor on the sum over attention experts. It is N if experts are slices of one
        attention: soft gates sum to 1, but the slices add up to the whole.
    embeddings (`str`): "averaged" (one embedding and one output head, the average of all), or "experts" (a table for
        each expert with soft gates, at the input and at the output).
    router_input (`str`): all routers read "token" (the hidden state of a token) or "prefix" (its running mean over the
        document so far).
    router_prior (`str`): "bigram" adds to the logits of all routers how probable the text of each expert makes the
        document so far (`prefix_bam.BigramPrior`). "none" adds nothing.
    router_prior_scale (`float`): factor on the log-probabilities of the prior.
    router_forgetting (`float`): factor on the running sums of `router_input` "prefix" and of the prior before each
        token is added. 1: all tokens of the document count equally.
    router_prior_buckets (`int`): number of counts of pairs of tokens for each expert.
    router_prior_vocab_size (`int`, *optional*): number of tokens that were counted, if it is below `vocab_size`.
    shared_expert_intermediate_size (`int`, *optional*): hidden size of an FFN that all tokens use beside the routed
        experts.
    dense_layers (`list[int]`, *optional*): layers without experts and routers. Each has one attention and one FFN, of
        the sizes `dense_intermediate_size`, `dense_num_attention_heads` and `dense_num_key_value_heads` (None: the
        size of an expert).
    router_aux_loss_coef, router_z_loss_coef (`float`): factors of the auxiliary losses, which are summed over layers,
        in the training loss.
    expert_names (`list[str]`): the dense model that each expert was made from: "seed" or a domain, in the order of the
        experts.
    seed_config (`dict`, *optional*): the `config.json` of the seed, with which a dense model can be restored.

    The block, which is that of the dense family:

    parallel_block (`bool`): `x + attention(norm(x)) + ffn(norm(x))` (Cohere) instead of attention before FFN (Llama).
    separate_ffn_norm (`bool`): in a parallel block, the FFN and the attention have separate norms (GPT-NeoX).
    norm_placement (`str`): "before" attention and FFN, or "after" them, before the residual is added (OLMo2).
    norm_type (`str`): "layernorm" or "rmsnorm".
    norm_bias (`bool`): norms have a bias (GPT-NeoX).
    qk_norm (`str`, *optional*): norm of queries and keys: for each head, with one weight [h] for all heads ("shared":
        Qwen3) or with a weight [heads, h] ("per_head": Cohere), or over all heads together ("full": OLMo2).
    attention_bias, attention_output_bias, mlp_bias (`bool`): biases of q, k and v; of o; of the FFN.
    mlp_gated (`bool`): `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))` (GPT-NeoX).
    hidden_act (`str`): a key of `ACTIVATIONS`.
    layer_types (`list[str]`, *optional*): "full_attention" or "sliding_attention" for each layer. None: sliding in all
        layers if there is a `sliding_window`, else full.
    nope_layers (`list[int]`, *optional*): layers without rotary positions (Cohere2's full attention).
    rope_parameters (`dict`): in transformers' layout, including `partial_rotary_factor`; the type is one of
        `ROPE_TYPES`.
    rope_interleaved (`bool`): rotate adjacent elements (Cohere) instead of the two halves (Llama).
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
    expert_num_attention_heads: int | None = None
    expert_num_key_value_heads: int | None = None
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
    embeddings: str = "averaged"
    router_input: str = "token"
    router_prior: str = "none"
    router_prior_scale: float = 0.25
    router_forgetting: float = 1.0
    router_prior_buckets: int = 1 << 20
    router_prior_vocab_size: int | None = None
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
        self._count_heads()
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        self._check_choices()
        self._check_block()
        self._check_mixture()

    def _count_heads(self) -> None:
        """Set the heads of one expert, unless they are given, and compute those of a layer from them."""
        if self.expert_num_attention_heads is None:
            self.expert_num_attention_heads = self.num_attention_heads
            self.expert_num_key_value_heads = self.num_key_value_heads
        if self.expert_num_key_value_heads is None:
            self.expert_num_key_value_heads = self.expert_num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.expert_num_attention_heads
        attentions = 1 if self.attention_experts == "averaged" else self.num_experts
        keys = attentions if self.attention_experts == "kv_experts" else 1
        self.num_attention_heads = attentions * self.expert_num_attention_heads
        self.num_key_value_heads = keys * self.expert_num_key_value_heads

    def _check_choices(self) -> None:
        for key, allowed in (
            ("attention_experts", ATTENTION_EXPERTS),
            ("embeddings", EMBEDDINGS),
            ("router_input", ROUTER_INPUTS),
            ("router_prior", ROUTER_PRIORS),
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

    def _check_block(self) -> None:
        if self.norm_placement == "after" and self.parallel_block:
            raise ValueError("norm_placement 'after' needs a sequential block: set parallel_block to False")
        if "sliding_attention" in (self.layer_types or ()) and self.sliding_window is None:
            raise ValueError("layer_types has 'sliding_attention' but sliding_window is None: set sliding_window")

    def _check_mixture(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}: use 1 to {self.num_experts}")
        if not 0.0 < self.router_forgetting <= 1.0:
            raise ValueError(f"router_forgetting is {self.router_forgetting}: use a number above 0, at most 1")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(
                f"capacity_factor is {self.capacity_factor}: use a number above 0, or None to drop no choices"
            )
        if self.expert_names is not None and len(self.expert_names) != self.num_experts:
            raise ValueError(
                f"expert_names has {len(self.expert_names)} names for {self.num_experts} experts: "
                "give one name for each expert"
            )
        if not set(self.dense_layers or ()) <= set(range(self.num_hidden_layers)):
            raise ValueError(f"dense_layers is {self.dense_layers}: use layers 0 to {self.num_hidden_layers - 1}")

    @property
    def routes_by_prefix(self) -> bool:
        """True if routers depend on the earlier tokens of a document."""
        return self.router_input == "prefix" or self.router_prior != "none"

    @property
    def mixture_layers(self) -> list[int]:
        """The layers that have experts, in ascending order: a forward pass returns router logits of these."""
        return [layer for layer in range(self.num_hidden_layers) if layer not in (self.dense_layers or ())]


def is_mixture(config: PreTrainedConfig | Mapping[str, Any]) -> bool:
    """Return True if `config`, which may be the content of a `config.json`, is that of a mixture."""
    model_type = config.get("model_type") if isinstance(config, Mapping) else config.model_type
    return bool(model_type == BamConfig.model_type)
