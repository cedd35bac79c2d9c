"""The attention of a mixture: soft experts as one call of an attention backend, or one dense attention.

Shapes: B batch, L length, S number of keys, T = B·L tokens, d hidden size, N experts of the layer, n experts on this
rank (N without expert parallelism), H query heads and G key/value heads of one expert, h head_dim, r its rotated part.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_exchange_bam import AttentionExchange, ComputedAttention, LocalAttentionExchange, PendingAttention
from .configuration_bam import BamConfig
from .prefix_bam import RoutingContext
from .routing_bam import BamRouter, keep_top

FEW_TOKENS = 64  # up to this number, reading the weights dominates, and copying them for a single GEMM does not pay


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, config: BamConfig) -> Tensor:
    """Apply LayerNorm or RMSNorm over the last dimension, in fp32; weight and bias broadcast over the others."""
    shape, eps, fused = x.shape[-1:], config.norm_eps, weight.ndim == 1
    inner = weight.float() if fused else None
    if config.norm_type == "layernorm":
        out = F.layer_norm(x.float(), shape, inner, bias.float() if fused and bias is not None else None, eps)
    else:
        out = F.rms_norm(x.float(), shape, inner, eps)
        out = out if bias is None else out + bias.float()
    return (out if fused else out * weight.float()).to(x.dtype)


class BamNorm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, with a weight of any shape."""

    def __init__(self, config: BamConfig, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of x."""
        return normalize(x, self.weight, self.bias, self.config)


def block_norm(config: BamConfig) -> BamNorm:
    """Return a norm of hidden states [..., d]."""
    return BamNorm(config, config.hidden_size, bias=config.norm_bias)


class BamRotaryEmbedding(nn.Module):
    """The cosines and sines of rotary position embeddings."""

    inv_freq: Tensor

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.config = config
        self.interleaved = config.rope_interleaved
        inv_freq, self.scaling = self.frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @staticmethod
    def frequencies(config: BamConfig) -> tuple[Tensor, float]:
        """Return the inverse frequencies [r/2] and the factor by which cosines and sines are scaled."""
        assert config.rope_parameters is not None and config.head_dim is not None
        kind = config.rope_parameters.get("rope_type", "default")
        if kind != "default":
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, None)
            return frequencies, float(scaling)
        rotated = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        steps = torch.arange(0, rotated, 2, dtype=torch.float)
        return 1.0 / (config.rope_parameters["rope_theta"] ** (steps / rotated)), 1.0

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [1 or B, L, r] of positions [1 or B, L], in the dtype and on the device of x."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)  # [1 or B, L, r/2]
        angles = angles.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first r elements of each head of x [B, heads, L, h] by cos, sin [1 or B, L, r]; keeps x's dtype."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [1 or B, 1, L, r]
    unrotated = x[..., cos.shape[-1] :]  # [B, heads, L, h - r]
    if unrotated.shape[-1]:
        x = x[..., : cos.shape[-1]]
    if interleaved:
        quarter_turn = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        quarter_turn = torch.cat((-second, first), dim=-1)
    # The cast is for autocast, under which x has a lower precision than cos and sin.
    rotated = (x * cos + quarter_turn * sin).to(x.dtype)
    return torch.cat((rotated, unrotated), dim=-1) if unrotated.shape[-1] else rotated


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention without a fused kernel.

    `query` is [B, heads, L, h]; `key` and `value` are [B, kv heads, S, h].

    Returns:
        The output [B, L, heads, h] and the attention weights [B, heads, L, S].
    """
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class BamAttentionCall(nn.Module):
    """The call of an attention backend.

    It is a module of its own for vLLM's Transformers backend, which finds the attention of a layer by this call in a
    `forward` and stores its own attention in the attribute `attn`.
    """

    def __init__(self, config: BamConfig, layer_idx: int, query_heads_per_key: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.layer_types is not None
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = query_heads_per_key  # attention backends read this attribute and is_causal
        self.is_causal = True
        self.scaling = config.head_dim**-0.5
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Return the output of all heads [B, L, heads, h].

        `query` is [B, heads, L, h]; `key` and `value` are [B, kv heads, S, h]. `kwargs` are passed to the backend.
        """
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        heads: Tensor = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )[0]
        batch, count, length, head_dim = query.shape
        return heads.view(batch, length, count, head_dim)  # backends may return it with fewer dimensions


class BamAttentionBase(nn.Module):
    """The common part of all attentions: rotary positions, the cache and the call of an attention backend."""

    def __init__(self, config: BamConfig, layer_idx: int, query_heads_per_key: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.backend = BamAttentionCall(config, layer_idx, query_heads_per_key)
        self.rotary = layer_idx not in (config.nope_layers or ())

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """Rotate queries and keys, update the cache and call the attention backend.

        `query` is [B, heads, L, h]; `key` and `value` are [B, kv heads, L, h]. `kwargs` are passed to the backend.

        Returns:
            The output of all heads [B, L, heads, h].
        """
        if self.rotary:
            cos, sin = position_embeddings
            interleaved = self.config.rope_interleaved
            query = apply_rotary(query, cos, sin, interleaved)
            key = apply_rotary(key, cos, sin, interleaved)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        heads: Tensor = self.backend(query, key, value, attention_mask, **kwargs)
        return heads

    def norm_shape(self, heads: int) -> tuple[int, ...]:
        """Return the shape of the weight that normalizes `heads` heads."""
        if self.config.qk_norm == "full":
            return (heads * self.head_dim,)
        return (heads, self.head_dim) if self.config.qk_norm == "per_head" else (self.head_dim,)


class BamAttentionExperts(BamAttentionBase):
    """N attentions as one call with N·H query heads and one stacked output projection.

    Soft routing weights the output of each expert's output projection. The projection is linear, so the heads are
    weighted before it, and one projection sums the experts.

    Under expert parallelism the parameters are those of the n experts of this rank.
    """

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        d, num_experts = config.hidden_size, config.num_experts
        heads, kv_heads = config.expert_num_attention_heads, config.expert_num_key_value_heads
        head_dim = config.head_dim
        assert heads is not None and kv_heads is not None and head_dim is not None
        self.kv_shared = config.attention_experts == "kv_shared"
        kv_experts = 1 if self.kv_shared else num_experts
        super().__init__(config, layer_idx, heads // kv_heads * (num_experts // kv_experts))
        self.heads, self.kv_heads = heads, kv_heads  # of one expert

        def stacked(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape)) if wanted else None

        self.q_proj = nn.Parameter(torch.empty(num_experts, heads * head_dim, d))
        self.k_proj = nn.Parameter(torch.empty(kv_experts, kv_heads * head_dim, d))
        self.v_proj = nn.Parameter(torch.empty(kv_experts, kv_heads * head_dim, d))
        self.o_proj = nn.Parameter(torch.empty(num_experts, d, heads * head_dim))
        self.q_bias = stacked(config.attention_bias, num_experts, heads * head_dim)
        self.k_bias = stacked(config.attention_bias, kv_experts, kv_heads * head_dim)
        self.v_bias = stacked(config.attention_bias, kv_experts, kv_heads * head_dim)
        self.o_bias = stacked(config.attention_output_bias, num_experts, d)
        has_norm = config.qk_norm is not None
        self.q_norm = stacked(has_norm, num_experts, *self.norm_shape(heads))
        self.k_norm = stacked(has_norm, kv_experts, *self.norm_shape(kv_heads))

    def forward(self, x: Tensor, gates: Tensor, **kwargs: Any) -> Tensor:
        """Return Σ_i gate_i · Attention_i(x) over the experts of this rank: x [B, L, d], gates [B, L, n] -> [B, L, d].

        `kwargs` are those of `attention`.
        """
        query = self.project(x, "q", self.q_norm)  # [B, L, n·H, h]
        query = self.group_by_key(query) if self.kv_shared else query.transpose(1, 2)  # [B, n·H, L, h]
        key = self.project(x, "k", self.k_norm).transpose(1, 2)  # [B, n·G or G, L, h]
        value = self.project(x, "v").transpose(1, 2)  # [B, n·G or G, L, h]
        heads = self.attention(query, key, value, **kwargs)  # [B, L, n·H, h]
        return self.sum_experts(heads, gates.to(heads.dtype))

    def linear(self, x: Tensor, role: str) -> Tensor:
        """Project x [B, L, d] to the queries ("q"), keys ("k") or values ("v") of m experts: [B, L, m·heads·h]."""
        weight, bias = getattr(self, f"{role}_proj"), getattr(self, f"{role}_bias")
        # [m, heads·h, d] -> [m·heads·h, d]: one GEMM for all experts.
        return F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())

    def project(self, x: Tensor, role: str, norm: Tensor | None = None) -> Tensor:
        """Project x [B, L, d] to the queries, keys or values of m experts, and normalize: [B, L, m·heads, h]."""
        out = self.linear(x, role)  # [B, L, m·heads·h]
        if norm is not None:
            if self.config.qk_norm == "full":
                out = out.unflatten(-1, norm.shape)  # [B, L, m, heads·h], norm [m, heads·h]
            else:
                out = out.unflatten(-1, (norm.shape[0], -1, self.head_dim))  # [B, L, m, heads, h]
                norm = norm.unsqueeze(1) if norm.ndim == 2 else norm  # [m, 1, h] or [m, heads, h]
            out = normalize(out, norm, None, self.config).flatten(2)  # [B, L, m·heads·h]
        heads: Tensor = out.unflatten(-1, (-1, self.head_dim))  # [B, L, m·heads, h]
        return heads

    def group_by_key(self, query: Tensor) -> Tensor:
        """Make the query heads that read the same shared key/value head neighbors: [B, L, n·H, h] -> [B, n·H, L, h]."""
        batch, length, all_heads, head_dim = query.shape
        experts, per_key = all_heads // self.heads, self.heads // self.kv_heads
        query = query.view(batch, length, experts, self.kv_heads, per_key, head_dim)  # [B, L, n, G, H/G, h]
        query = query.permute(0, 3, 2, 4, 1, 5)  # [B, G, n, H/G, L, h]
        return query.reshape(batch, all_heads, length, head_dim)  # [B, n·H, L, h]

    def sum_experts(self, heads: Tensor, gates: Tensor) -> Tensor:
        """Weight the heads [B, L, n·H, h] by gates [B, L, n], project them and sum the experts: [B, L, d]."""
        batch, length, experts = gates.shape
        tokens, width = batch * length, self.heads * self.head_dim
        if self.kv_shared:  # heads are ordered as `group_by_key` has left them
            per_key = self.heads // self.kv_heads
            heads = heads.view(batch, length, self.kv_heads, experts, per_key, self.head_dim)  # [B, L, G, n, H/G, h]
            heads = heads * gates.view(batch, length, 1, experts, 1, 1)
            heads = heads.transpose(2, 3).reshape(tokens, experts, width)  # [B, L, n, G, H/G, h] -> [T, n, H·h]
        else:
            heads = heads.view(batch, length, experts, width) * gates.unsqueeze(-1)  # [B, L, n, H·h]
            heads = heads.view(tokens, experts, width)  # [T, n, H·h]
        out = self.output(heads).view(batch, length, -1)  # [B, L, d]
        return out if self.o_bias is None else out + gates @ self.o_bias.to(gates.dtype)

    def output(self, heads: Tensor) -> Tensor:
        """Apply the output projection of each expert to its weighted heads [T, n, H·h], and sum the experts: [T, d]."""
        if len(heads) <= FEW_TOKENS:  # n GEMMs: [n, T, H·h] · [n, H·h, d] -> [n, T, d] -> [T, d]
            return torch.bmm(heads.transpose(0, 1), self.o_proj.transpose(1, 2)).sum(0)
        # one GEMM that also sums the experts: [T, n·H·h] · [d, n·H·h]ᵀ -> [T, d]
        return F.linear(heads.flatten(1), self.o_proj.transpose(0, 1).flatten(1))


class BamAttention(nn.Module):
    """The attention of a mixture layer: a router and its soft experts."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        self.top_k = config.num_attention_experts_per_tok
        self.scale = config.attention_output_scale
        self.gate = BamRouter(config)
        self.attention_experts = BamAttentionExperts(config, layer_idx)
        self.exchange: AttentionExchange = LocalAttentionExchange()

    def forward(
        self, x: Tensor, routing: RoutingContext | None = None, **kwargs: Any
    ) -> tuple[PendingAttention, Tensor]:
        """Start the attention of x [B, L, d].

        `routing` is what the router knows of the documents so far, and `kwargs` are those of
        `BamAttentionBase.attention`.

        Returns:
            The pending output [B, L, d] and the router logits [T, N].
        """
        logits = self.gate(x, routing)  # [B, L, N]
        pending = self.exchange.start(x, self.gates(logits) * self.scale, partial(self.attention_experts, **kwargs))
        return pending, logits.flatten(0, 1)

    def gates(self, logits: Tensor) -> Tensor:
        """Return the gates [..., N] for logits [..., N], before they are scaled."""
        return keep_top(logits.softmax(-1), self.top_k)


class AveragedAttention(BamAttentionBase):
    """One dense attention: the average of all experts (BTX), or the attention of a dense layer."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        d, head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.expert_num_attention_heads, config.expert_num_key_value_heads
        if layer_idx in (config.dense_layers or ()):
            heads = config.dense_num_attention_heads or heads
            kv_heads = config.dense_num_key_value_heads or kv_heads
        assert heads is not None and kv_heads is not None and head_dim is not None
        super().__init__(config, layer_idx, heads // kv_heads)
        bias = config.attention_bias
        self.q_proj = nn.Linear(d, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(d, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(d, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, d, bias=config.attention_output_bias)
        self.q_norm = BamNorm(config, *self.norm_shape(heads)) if config.qk_norm else None
        self.k_norm = BamNorm(config, *self.norm_shape(kv_heads)) if config.qk_norm else None

    def project(self, x: Tensor, projection: nn.Linear, norm: BamNorm | None = None) -> Tensor:
        """Project x [B, L, d] to heads and normalize them: [B, heads, L, h]."""
        out: Tensor = projection(x)  # [B, L, heads·h]
        if norm is not None and self.config.qk_norm == "full":
            out, norm = norm(out), None
        out = out.unflatten(-1, (-1, self.head_dim))  # [B, L, heads, h]
        return (out if norm is None else norm(out)).transpose(1, 2)  # [B, heads, L, h]

    def forward(self, x: Tensor, routing: RoutingContext | None = None, **kwargs: Any) -> tuple[PendingAttention, None]:
        """Compute the attention of x [B, L, d].

        `kwargs` are those of `attention`; `routing` is not used, because there is no router.

        Returns:
            The output [B, L, d], complete but in the form that `BamAttention` returns, and None: it has no router.
        """
        query = self.project(x, self.q_proj, self.q_norm)
        key = self.project(x, self.k_proj, self.k_norm)
        heads = self.attention(query, key, self.project(x, self.v_proj), **kwargs)  # [B, L, heads, h]
        out: Tensor = self.o_proj(heads.flatten(2))  # [B, L, heads·h] -> [B, L, d]
        return ComputedAttention(out), None
