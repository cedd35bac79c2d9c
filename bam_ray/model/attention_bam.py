"""The attention of the BAM mixture: soft experts as one call of an attention backend, or one dense attention.

Shapes: B batch, L length, S keys, T = B·L tokens, d hidden, N experts, H query heads, G key/value heads, h head_dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_bam import BamConfig
from .routing_bam import BamRouter

FEW_TOKENS = 64  # below this, reading the weights dominates and no GEMM is worth copying them for


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, config: BamConfig) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, in fp32; weight and bias broadcast over the ones before."""
    shape, eps, fused = x.shape[-1:], config.norm_eps, weight.ndim == 1
    inner = weight.float() if fused else None
    if config.norm_type == "layernorm":
        out = F.layer_norm(x.float(), shape, inner, bias.float() if fused and bias is not None else None, eps)
    else:
        out = F.rms_norm(x.float(), shape, inner, eps)
        out = out if bias is None else out + bias.float()
    return (out if fused else out * weight.float()).to(x.dtype)


class BamNorm(nn.Module):
    """LayerNorm or RMSNorm with a weight of any shape, over the last dimension."""

    def __init__(self, config: BamConfig, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, self.weight, self.bias, self.config)


def block_norm(config: BamConfig) -> BamNorm:
    """One of the norms of hidden states [..., d]."""
    return BamNorm(config, config.hidden_size, bias=config.norm_bias)


class BamRotaryEmbedding(nn.Module):
    """cos and sin [1 or B, L, r] of rotary positions; r is the rotated part of head_dim."""

    inv_freq: Tensor

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.config = config
        self.interleaved = config.rope_interleaved
        inv_freq, self.scaling = self.frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @staticmethod
    def frequencies(config: BamConfig) -> tuple[Tensor, float]:
        """Inverse frequencies [r/2] and the factor on cos and sin."""
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
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        angles = angles.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first r elements of each head of x [B, heads, L, h] by cos, sin [1 or B, L, r]; the dtype of x."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    kept = x[..., cos.shape[-1] :]
    if kept.shape[-1]:
        x = x[..., : cos.shape[-1]]
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    rotated = (x * cos + turned * sin).to(x.dtype)  # under autocast x is of less precision than cos and sin
    return torch.cat((rotated, kept), dim=-1) if kept.shape[-1] else rotated


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
    """Plain attention. query [B, heads, L, h], key and value [B, kv heads, S, h] -> [B, L, heads, h] and weights."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class LocalExchange:
    """Every token to every attention expert, all experts being here."""

    def __call__(self, x: Tensor, gates: Tensor, attend: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x [B, L, d], gates [B, L, N] -> `attend(x, gates)`: [B, L, d]."""
        return attend(x, gates)


class AttentionCall(nn.Module):
    """What is the same for all attentions: positions, cache and the call of an attention backend."""

    def __init__(self, config: BamConfig, layer_idx: int, query_heads_per_key: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.layer_types is not None
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = query_heads_per_key  # read by attention backends, as is_causal is
        self.is_causal = True
        self.scaling = config.head_dim**-0.5
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        self.rotary = layer_idx not in (config.nope_layers or ())

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """query [B, heads, L, h], key and value [B, kv heads, L, h] -> [B, L, heads, h]."""
        if self.rotary:
            cos, sin = position_embeddings
            interleaved = self.config.rope_interleaved
            query, key = rotate(query, cos, sin, interleaved), rotate(key, cos, sin, interleaved)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        heads: Tensor = interface(
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
        return heads

    def norm_shape(self, heads: int) -> tuple[int, ...]:
        """The shape of the weight that normalises `heads` heads."""
        if self.config.qk_norm == "full":
            return (heads * self.head_dim,)
        return (heads, self.head_dim) if self.config.qk_norm == "per_head" else (self.head_dim,)


class BamAttentionExperts(AttentionCall):
    """N attentions as one call: N·H query heads, expert i's weighted by g_i, one stacked output projection.

    Soft routing weighs after the output projection; by linearity weighing the heads before it is the same.
    """

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        d, N = config.hidden_size, config.num_experts
        H, G, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert G is not None and h is not None
        self.kv_shared = config.attention_experts == "kv_shared"
        K = 1 if self.kv_shared else N
        super().__init__(config, layer_idx, H // G * (N // K))
        self.heads, self.kv_heads = H, G

        def stacked(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape)) if wanted else None

        self.q_proj = nn.Parameter(torch.empty(N, H * h, d))
        self.k_proj = nn.Parameter(torch.empty(K, G * h, d))
        self.v_proj = nn.Parameter(torch.empty(K, G * h, d))
        self.o_proj = nn.Parameter(torch.empty(N, d, H * h))
        self.q_bias = stacked(config.attention_bias, N, H * h)
        self.k_bias = stacked(config.attention_bias, K, G * h)
        self.v_bias = stacked(config.attention_bias, K, G * h)
        self.o_bias = stacked(config.attention_output_bias, N, d)
        normed = config.qk_norm is not None
        self.q_norm = stacked(normed, N, *self.norm_shape(H))
        self.k_norm = stacked(normed, K, *self.norm_shape(G))
        self.exchange: Callable[..., Tensor] = LocalExchange()

    def forward(self, x: Tensor, gates: Tensor, **kwargs: Any) -> Tensor:
        """x [B, L, d], gates [B, L, N] -> Σ_i g_i · Attention_i(x): [B, L, d]. `kwargs`: those of `call`."""
        out: Tensor = self.exchange(x, gates, partial(self.attend, **kwargs))
        return out

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None = None) -> Tensor:
        """x [B, L, d] by weights [n, heads·h, d] of n experts -> [B, L, n·heads, h]."""
        out = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        if norm is not None:
            if self.config.qk_norm == "full":
                out = out.unflatten(-1, norm.shape)
            else:
                out = out.unflatten(-1, (norm.shape[0], -1, self.head_dim))
                norm = norm.unsqueeze(1) if norm.ndim == 2 else norm
            out = normalise(out, norm, None, self.config).flatten(2)
        heads: Tensor = out.unflatten(-1, (-1, self.head_dim))
        return heads

    def attend(self, x: Tensor, gates: Tensor, **kwargs: Any) -> Tensor:
        """The experts held here: x [B, L, d], their gates [B, L, n] -> their weighted sum [B, L, d]."""
        B, L, _ = x.shape
        n, H, G, h = self.q_proj.shape[0], self.heads, self.kv_heads, self.head_dim
        query = self.project(x, self.q_proj, self.q_bias, self.q_norm)
        if self.kv_shared:  # heads that share a key/value head must be neighbours: [G, n, H/G]
            query = query.view(B, L, n, G, H // G, h).permute(0, 3, 2, 4, 1, 5).reshape(B, n * H, L, h)
        else:
            query = query.transpose(1, 2)
        key = self.project(x, self.k_proj, self.k_bias, self.k_norm).transpose(1, 2)
        value = self.project(x, self.v_proj, self.v_bias).transpose(1, 2)
        heads = self.call(query, key, value, **kwargs)  # [B, L, n·H, h]
        gates = gates.to(heads.dtype)
        if self.kv_shared:
            heads = heads.view(B, L, G, n, H // G, h) * gates.view(B, L, 1, n, 1, 1)
            heads = heads.transpose(2, 3).reshape(B * L, n, H * h)
        else:
            heads = (heads.view(B, L, n, H * h) * gates.unsqueeze(-1)).view(B * L, n, H * h)
        if B * L <= FEW_TOKENS:
            out = torch.bmm(heads.transpose(0, 1), self.o_proj.transpose(1, 2)).sum(0)
        else:  # one GEMM that sums the experts inside
            out = F.linear(heads.flatten(1), self.o_proj.transpose(0, 1).flatten(1))
        out = out.view(B, L, -1)
        return out if self.o_bias is None else out + gates @ self.o_bias.to(gates.dtype)


class BamAttention(nn.Module):
    """The attention of a layer: a router and its soft experts."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        self.top_k = config.num_attention_experts_per_tok
        self.scale = config.attention_output_scale
        self.gate = BamRouter(config)
        self.experts = BamAttentionExperts(config, layer_idx)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B, L, d] -> output [B, L, d], router logits [T, N]."""
        logits = self.gate(x)
        gates = logits.softmax(-1)
        if self.top_k:
            gates = gates * torch.zeros_like(gates).scatter(-1, gates.topk(self.top_k, dim=-1).indices, 1.0)
        return self.experts(x, gates * self.scale, **kwargs), logits.flatten(0, 1)


class AveragedAttention(AttentionCall):
    """One dense attention: the mean of all (BTX), or a dense layer's."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        d, h = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        if layer_idx in (config.dense_layers or ()):
            H = config.dense_num_attention_heads or H
            G = config.dense_num_key_value_heads or G
        assert G is not None and h is not None
        super().__init__(config, layer_idx, H // G)
        bias = config.attention_bias
        self.q_proj = nn.Linear(d, H * h, bias=bias)
        self.k_proj = nn.Linear(d, G * h, bias=bias)
        self.v_proj = nn.Linear(d, G * h, bias=bias)
        self.o_proj = nn.Linear(H * h, d, bias=config.attention_output_bias)
        self.q_norm = BamNorm(config, *self.norm_shape(H)) if config.qk_norm else None
        self.k_norm = BamNorm(config, *self.norm_shape(G)) if config.qk_norm else None

    def project(self, x: Tensor, projection: nn.Linear, norm: BamNorm | None = None) -> Tensor:
        """x [B, L, d] -> [B, heads, L, h]."""
        out: Tensor = projection(x)
        if norm is not None and self.config.qk_norm == "full":
            out, norm = norm(out), None
        out = out.unflatten(-1, (-1, self.head_dim))
        return (out if norm is None else norm(out)).transpose(1, 2)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """[B, L, d] -> output [B, L, d], no router logits."""
        query = self.project(x, self.q_proj, self.q_norm)
        key = self.project(x, self.k_proj, self.k_norm)
        heads = self.call(query, key, self.project(x, self.v_proj), **kwargs)
        out: Tensor = self.o_proj(heads.flatten(2))
        return out, None
