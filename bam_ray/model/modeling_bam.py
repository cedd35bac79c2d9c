"""The BAM mixture: FFN experts and soft attention experts over one dense transformer (arXiv 2408.08274).

Shapes: B batch, L length, T = B·L tokens, d hidden, N experts, k experts a token, H query heads, G key/value heads,
h head_dim, f FFN hidden, V vocabulary.

The model knows nothing of ranks. Tokens reach their experts through two seams, `BamExperts.dispatcher` and
`BamAttentionExperts.exchange`: here they stay in place; expert-parallel training puts collectives in their place. What
an exchange gives may be under way until it has passed `BamDecoderLayer.arrived`, in a parallel block beside the FFN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_bam import BamConfig
from .experts_bam import BamExperts
from .routing_bam import BamRouter, choose, routing_losses, within_capacity

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


class BamFFN(nn.Module):
    """One dense FFN: of a dense layer, or the always-on expert beside the routed ones."""

    def __init__(self, config: BamConfig, width: int) -> None:
        super().__init__()
        d, bias = config.hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, width, bias=bias) if config.mlp_gated else None
        self.up_proj = nn.Linear(d, width, bias=bias)
        self.down_proj = nn.Linear(width, d, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, None]:
        """[B, L, d] -> output [B, L, d], no router logits."""
        up = self.up_proj(x)
        out: Tensor = self.down_proj(self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * up)
        return out, None


class BamMoE(nn.Module):
    """The FFN of a layer: a router, its experts and, where there is one, the expert that all tokens meet."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.capacity_factor = config.capacity_factor
        self.scale = config.ffn_output_scale
        self.gate = BamRouter(config, config.noisy_gate, config.selection_bias)
        self.experts = BamExperts(config)
        width = config.shared_expert_intermediate_size
        self.shared_expert = BamFFN(config, width) if width else None

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [T, N] -> the k experts of each token and their weights: [T, k] both."""
        probabilities = logits.softmax(-1)
        index = choose(probabilities, self.top_k, self.gate.selection_bias)
        weights = probabilities.gather(-1, index)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return index, weights * self.scale

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, L, d] -> output [B, L, d], router logits [T, N]; padding tokens are False in `real` [B, L].

        With a noisy gate, in training, [3, T, N]: the logits with noise, those without, and the noise's scale.
        """
        flat = x.reshape(-1, x.shape[-1])
        logits = routed = self.gate(flat)
        if self.training and self.gate.noise_weight is not None:
            scale = self.gate.noise_scale(flat)
            routed = logits + torch.randn_like(logits) * scale
            logits = torch.stack((routed, logits, scale))
        index, weights = self.route(routed)
        kept = None
        if self.training and self.capacity_factor is not None:
            by_sequence = index.view(*x.shape[:-1], -1)
            kept = within_capacity(by_sequence, logits.shape[-1], self.capacity_factor, real).view_as(index)
        out = self.experts(flat, index, weights, kept).view_as(x)
        return out if self.shared_expert is None else out + self.shared_expert(x)[0], logits


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


def at_hand(attended: Tensor) -> Tensor:
    """Attention's output, which is here as soon as it is computed."""
    return attended


class BamDecoderLayer(GradientCheckpointingLayer):
    """One block, parallel or sequential, of experts or dense."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        dense = layer_idx in (config.dense_layers or ())
        averaged = dense or config.attention_experts == "averaged"
        self.self_attn = (AveragedAttention if averaged else BamAttention)(config, layer_idx)
        width = config.dense_intermediate_size or config.intermediate_size
        self.mlp = BamFFN(config, width) if dense else BamMoE(config)
        self.parallel = config.parallel_block
        self.arrived: Callable[[Tensor], Tensor] = at_hand
        before = config.norm_placement == "before"
        ffn_norm = not self.parallel or config.separate_ffn_norm
        self.input_layernorm = block_norm(config) if before else None
        self.post_attention_layernorm = block_norm(config) if ffn_norm else None
        self.post_feedforward_layernorm = None if before else block_norm(config)

    def forward(
        self, x: Tensor, real: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[B, L, d] -> [B, L, d], FFN router logits [T, N], attention router logits [T, N]: None where it has none.

        `real` [B, L]: padding tokens are False; None: there are none.
        """
        first, second, third = self.input_layernorm, self.post_attention_layernorm, self.post_feedforward_layernorm
        u = x if first is None else first(x)
        attended, attention_logits = self.self_attn(u, **kwargs)
        if self.parallel:
            routed, logits = self.mlp(u if second is None else second(x), real)
            return x + self.arrived(attended) + routed, logits, attention_logits
        assert second is not None
        attended = self.arrived(attended)
        if third is None:
            x = x + attended
            routed, logits = self.mlp(second(x), real)
            return x + routed, logits, attention_logits
        x = x + second(attended)
        routed, logits = self.mlp(x, real)
        return x + third(routed), logits, attention_logits


@dataclass
class BamModelOutput(ModelOutput):
    """Of `BamModel`."""

    last_hidden_state: Tensor | None = None  # [B, L, d]
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    attention_router_logits: tuple[Tensor, ...] | None = None


@dataclass
class BamCausalLMOutput(ModelOutput):
    """Of `BamForCausalLM`. `loss` is `nll` in evaluation, and in training the weighted auxiliary losses are added.

    `router_logits`, `attention_router_logits`: one [T, N] a layer, where asked for (the latter empty for BTX).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None  # [B, L, V]
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    nll: Tensor | None = None
    load_balance_loss: Tensor | None = None
    router_z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    attention_router_logits: tuple[Tensor, ...] | None = None


MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def masks_of(
    config: BamConfig,
    inputs_embeds: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
) -> dict[str, Tensor | None]:
    """The attention masks of every kind of layer. Without `attention_mask` and cache, positions [B, L] that begin anew
    within a sequence part it into documents, which do not see each other."""
    return {
        kind: MASKS[kind](
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        for kind in sorted(set(config.layer_types or ()))
    }


def real_tokens(attention_mask: Any, length: int) -> Tensor | None:
    """Which of the last `length` tokens are no padding: bool [B, length]; None where the mask is not of that kind."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -length:].bool()


class BamPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the model."""

    config_class = BamConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("BamDecoderLayer",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, BamExperts | BamAttentionExperts | BamRouter):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                elif name.endswith("_norm"):
                    init.ones_(parameter)
                elif name == "noise_weight":  # as LLaMA-MoE
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=std)
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
        elif isinstance(module, BamNorm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, BamRotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies(module.config)[0])


class BamModel(BamPreTrainedModel):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BamDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = block_norm(config)
        self.rotary_emb = BamRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator] # as theirs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BamModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        if isinstance(attention_mask, dict):  # `generate` has made them
            masks = attention_mask
        else:
            masks = masks_of(self.config, inputs_embeds, position_ids, attention_mask, cache)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        real = real_tokens(attention_mask, inputs_embeds.shape[1])
        x = inputs_embeds
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states, routers, attention_routers = [x], [], []
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x, logits, attention_logits = layer(
                x,
                real=real,
                position_embeddings=position_embeddings,
                attention_mask=masks[kind],
                position_ids=position_ids,
                cache=cache,
                **kwargs,
            )
            if keep_states:
                states.append(x)
            if logits is not None:
                routers.append(logits)
            if attention_logits is not None:
                attention_routers.append(attention_logits)
        x = self.norm(x)
        return BamModelOutput(
            last_hidden_state=x,
            cache=cache if use_cache else None,
            hidden_states=(*states[:-1], x) if keep_states else None,
            router_logits=tuple(routers),
            attention_router_logits=tuple(attention_routers),
        )


class BamForCausalLM(BamPreTrainedModel, GenerationMixin):
    """The mixture with its language-model head."""

    _tied_weights_keys: dict[str, str] = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config)
        self.model = BamModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def selection_biases(self) -> Tensor | None:
        """[mixture layers, N], where there are any."""
        if not self.config.selection_bias:
            return None
        return torch.stack([self.model.layers[layer].mlp.gate.selection_bias for layer in self.config.mixture_layers])

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator] # as theirs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> BamCausalLMOutput:
        """input_ids [B, L] -> logits [B, L, V] (of the last `logits_to_keep` positions where that is given)."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept]) * self.config.logit_scale
        loss = nll = None
        auxiliary = None
        if labels is not None:
            loss = nll = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            if out.router_logits:
                real = real_tokens(attention_mask, out.last_hidden_state.shape[1])
                auxiliary = routing_losses(
                    out.router_logits,
                    self.config.num_experts_per_tok,
                    real=None if real is None else real.flatten(),
                    bias=self.selection_biases(),
                )
            if auxiliary and self.training:
                loss = (
                    nll
                    + self.config.router_aux_loss_coef * auxiliary.load_balance
                    + self.config.router_z_loss_coef * auxiliary.router_z
                )
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        return BamCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=out.cache,
            hidden_states=out.hidden_states,
            nll=nll,
            load_balance_loss=auxiliary.load_balance if auxiliary else None,
            router_z_loss=auxiliary.router_z if auxiliary else None,
            router_logits=out.router_logits if wanted else None,
            attention_router_logits=out.attention_router_logits if wanted else None,
        )
