"""The BAM mixture: FFN experts and soft attention experts over one dense transformer (arXiv 2408.08274).

Shapes: B batch, L length, T = B·L tokens, d hidden, N experts, k experts a token, H query heads, G key/value heads,
h head_dim, f FFN hidden, V vocabulary.

The model knows nothing of ranks. Tokens reach their experts through two seams, `BamExperts.dispatcher` and
`BamAttentionExperts.exchange`: here they stay in place; expert-parallel training puts collectives in their place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_bam import BamConfig

FEW_TOKENS = 64  # below this, reading the weights dominates and no GEMM is worth copying them for


@dataclass(frozen=True)
class RoutingLosses:
    """Auxiliary losses of the FFN routers, each summed over layers: scalars."""

    load_balance: Tensor
    router_z: Tensor


def routing_losses(
    router_logits: tuple[Tensor, ...], top_k: int, reduce: Callable[[Tensor], Tensor] | None = None
) -> RoutingLosses:
    """Load-balance and z-loss of FFN routers, summed over layers.

    `L_LB = N · Σ_i f_i · P_i`, with f_i the fraction of all choices that fell on expert i (no gradient) and P_i its
    mean probability (Switch; 1 when balanced); `L_z = mean (logsumexp logits)²` (ST-MoE).
    `router_logits`: one [T, N] a layer. `reduce` averages f over data-parallel ranks, so that their mean loss is the
    loss of the global batch.
    """
    logits = torch.stack(router_logits).float()  # [layers, T, N]
    experts = logits.shape[-1]
    probabilities = logits.softmax(-1)
    chosen = probabilities.detach().topk(top_k, dim=-1).indices  # [layers, T, k]
    fraction = F.one_hot(chosen, experts).float().mean((1, 2))  # [layers, N]
    if reduce is not None:
        fraction = reduce(fraction)
    load_balance = experts * (fraction * probabilities.mean(1)).sum()
    router_z = logits.logsumexp(-1).square().mean(1).sum()
    return RoutingLosses(load_balance=load_balance, router_z=router_z)


class BamNorm(nn.Module):
    """LayerNorm without bias, or RMSNorm; computed in fp32."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.norm_eps
        self.centre = config.norm_type == "layernorm"

    def forward(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        weight = self.weight.float()
        if self.centre:
            return F.layer_norm(x.float(), shape, weight, None, self.eps).to(x.dtype)
        return F.rms_norm(x.float(), shape, weight, self.eps).to(x.dtype)


class BamRotaryEmbedding(nn.Module):
    """cos and sin [1 or B, L, h] of rotary positions."""

    inv_freq: Tensor

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.config = config
        self.interleaved = config.rope_interleaved
        inv_freq, self.scaling = self.frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @staticmethod
    def frequencies(config: BamConfig) -> tuple[Tensor, float]:
        """Inverse frequencies [h/2] and the factor on cos and sin, of any of transformers' static RoPE types."""
        assert config.rope_parameters is not None
        kind = config.rope_parameters.get("rope_type", "default")
        if kind != "default":
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, None)
            return frequencies, float(scaling)
        assert config.head_dim is not None
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float)
        return 1.0 / (config.rope_parameters["rope_theta"] ** (steps / config.head_dim)), 1.0

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        angles = angles.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate x [B, heads, L, h] by cos, sin [1 or B, L, h]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return x * cos + turned * sin


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


class BamRouter(nn.Module):
    """A linear router without bias: [..., d] -> logits [..., N], in fp32 whatever autocast says."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class LocalDispatcher:
    """Tokens to the experts they chose and back, all experts being here."""

    def __call__(
        self,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        num_experts: int,
        compute: Callable[[Tensor, list[int]], Tensor],
    ) -> Tensor:
        """hidden [T, d], index and weights [T, k] -> Σ_k weight · expert(hidden): [T, d].

        `compute(rows [R, d], counts of N)` applies each expert to its consecutive rows.
        """
        flat = index.reshape(-1)
        order = flat.argsort(stable=True)
        token = order // index.shape[1]
        rows = compute(hidden.index_select(0, token), flat.bincount(minlength=num_experts).tolist())
        rows = rows.to(hidden.dtype)  # autocast computes them in less
        rows = rows * weights.reshape(-1).index_select(0, order).unsqueeze(1).to(rows.dtype)
        return torch.zeros_like(hidden).index_add(0, token, rows)


class BamExperts(nn.Module):
    """N gated FFNs, stacked: `down(act(gate(x)) * up(x))` each."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        d, f, N = config.hidden_size, config.intermediate_size, config.num_experts
        self.num_experts = N  # of the whole mixture, wherever they are
        self.gate_up_proj = nn.Parameter(torch.empty(N, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(N, d, f))
        self.act_fn = ACT2FN[config.hidden_act]
        self.dispatcher: Callable[..., Tensor] = LocalDispatcher()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, d], [T, k], [T, k] -> [T, d]."""
        return self.dispatcher(hidden_states, top_k_index, top_k_weights, self.num_experts, self.compute)

    def compute(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Apply expert i to its counts[i] rows: rows [R, d] sorted by expert -> [R, d].

        `unbind` once: indexing a stacked parameter inside autograd costs a whole-size gradient each time.
        """
        gate_up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        outputs = []
        for expert, part in enumerate(rows.split(counts)):
            if part.shape[0] == 0 and not self.training:
                continue  # in training an idle expert stays in the graph, so that it gets a zero gradient
            gate, up = F.linear(part, gate_up[expert]).chunk(2, dim=-1)
            outputs.append(F.linear(self.act_fn(gate) * up, down[expert]))
        return torch.cat(outputs) if outputs else rows


class BamMoE(nn.Module):
    """The FFN of a layer: a router and its experts."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.scale = config.ffn_output_scale
        self.gate = BamRouter(config)
        self.experts = BamExperts(config)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [T, N] -> the k experts of each token and their weights: [T, k] both."""
        weights, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return index, weights * self.scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, d] -> output [B, L, d], router logits [T, N]."""
        flat = x.reshape(-1, x.shape[-1])
        logits = self.gate(flat)
        index, weights = self.route(logits)
        return self.experts(flat, index, weights).view_as(x), logits


class LocalExchange:
    """Every token to every attention expert, all experts being here."""

    def __call__(self, x: Tensor, gates: Tensor, attend: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x [B, L, d], gates [B, L, N] -> `attend(x, gates)`: [B, L, d]."""
        return attend(x, gates)


class BamAttentionExperts(nn.Module):
    """N attentions as one call: N·H query heads, expert i's weighted by g_i, one stacked output projection.

    Soft routing weighs after the output projection; by linearity weighing the heads before it is the same.
    """

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        d, N = config.hidden_size, config.num_experts
        H, G, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert G is not None and h is not None
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.heads, self.kv_heads = h, H, G
        self.kv_shared = config.attention_experts == "kv_shared"
        kv_experts = 1 if self.kv_shared else N
        self.num_key_value_groups = H // G * (N if self.kv_shared else 1)  # read by the attention interface
        self.interleaved = config.rope_interleaved
        self.scaling = h**-0.5
        self.is_causal = True
        self.q_proj = nn.Parameter(torch.empty(N, H * h, d))
        self.k_proj = nn.Parameter(torch.empty(kv_experts, G * h, d))
        self.v_proj = nn.Parameter(torch.empty(kv_experts, G * h, d))
        self.o_proj = nn.Parameter(torch.empty(N, d, H * h))
        self.exchange: Callable[..., Tensor] = LocalExchange()

    def forward(
        self,
        x: Tensor,
        gates: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """x [B, L, d], gates [B, L, N] -> Σ_i g_i · Attention_i(x): [B, L, d]."""

        def attend(x: Tensor, gates: Tensor) -> Tensor:
            return self.attend(x, gates, position_embeddings, attention_mask, past_key_values, **kwargs)

        return self.exchange(x, gates, attend)

    def attend(
        self,
        x: Tensor,
        gates: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """The experts held here: x [B, L, d], their gates [B, L, n] -> their weighted sum [B, L, d]."""
        B, L, _ = x.shape
        n, H, G, h = self.q_proj.shape[0], self.heads, self.kv_heads, self.head_dim
        query = F.linear(x, self.q_proj.flatten(0, 1))
        if self.kv_shared:  # heads that share a key/value head must be neighbours: [G, n, H/G]
            query = query.view(B, L, n, G, H // G, h).permute(0, 3, 2, 4, 1, 5).reshape(B, n * H, L, h)
        else:
            query = query.view(B, L, n * H, h).transpose(1, 2)
        key = F.linear(x, self.k_proj.flatten(0, 1)).view(B, L, -1, h).transpose(1, 2)
        value = F.linear(x, self.v_proj.flatten(0, 1)).view(B, L, -1, h).transpose(1, 2)
        cos, sin = position_embeddings
        query, key = rotate(query, cos, sin, self.interleaved), rotate(key, cos, sin, self.interleaved)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        heads, _ = interface(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # [B, L, n·H, h]
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
        return out.view(B, L, -1)


class BamAttention(nn.Module):
    """The attention of a layer: a router and its soft experts."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        self.top_k = config.num_attention_experts_per_tok
        self.gate = BamRouter(config)
        self.experts = BamAttentionExperts(config, layer_idx)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B, L, d] -> output [B, L, d], router logits [T, N]."""
        logits = self.gate(x)
        gates = logits.softmax(-1)
        if self.top_k:
            gates = gates * torch.zeros_like(gates).scatter(-1, gates.topk(self.top_k, dim=-1).indices, 1.0)
        return self.experts(x, gates, **kwargs), logits.flatten(0, 1)


class AveragedAttention(nn.Module):
    """One dense attention (BTX: the mean of all)."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        d, H, G, h = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert G is not None and h is not None
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = h
        self.num_key_value_groups = H // G
        self.interleaved = config.rope_interleaved
        self.scaling = h**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(d, H * h, bias=False)
        self.k_proj = nn.Linear(d, G * h, bias=False)
        self.v_proj = nn.Linear(d, G * h, bias=False)
        self.o_proj = nn.Linear(H * h, d, bias=False)

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[B, L, d] -> output [B, L, d], no router logits."""
        B, L, _ = x.shape
        query, key, value = (
            projection(x).view(B, L, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = position_embeddings
        query, key = rotate(query, cos, sin, self.interleaved), rotate(key, cos, sin, self.interleaved)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        heads, _ = interface(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(heads.reshape(B, L, -1)), None


class BamDecoderLayer(GradientCheckpointingLayer):
    """One block, parallel (`x + A(u) + M(u)`) or sequential."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        attention = AveragedAttention if config.attention_experts == "averaged" else BamAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = BamMoE(config)
        self.input_layernorm = BamNorm(config)
        self.parallel = config.parallel_block
        if not self.parallel:
            self.post_attention_layernorm = BamNorm(config)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """[B, L, d] -> [B, L, d], FFN router logits [T, N], attention router logits [T, N] or None."""
        u = self.input_layernorm(x)
        attended, attention_logits = self.self_attn(u, **kwargs)
        x = x + attended
        if not self.parallel:
            u = self.post_attention_layernorm(x)
        routed, logits = self.mlp(u)
        return x + routed, logits, attention_logits


@dataclass
class BamModelOutput(ModelOutput):
    """Of `BamModel`."""

    last_hidden_state: Tensor | None = None  # [B, L, d]
    past_key_values: Cache | None = None
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
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    nll: Tensor | None = None
    load_balance_loss: Tensor | None = None
    router_z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    attention_router_logits: tuple[Tensor, ...] | None = None


class BamPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the model."""

    config_class = BamConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("BamDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, BamExperts | BamAttentionExperts | BamRouter):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, BamRotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies(module.config)[0])


class BamModel(BamPreTrainedModel):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BamDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = BamNorm(config)
        self.rotary_emb = BamRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
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
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        x = inputs_embeds
        states, routers, attention_routers = [x], [], []
        for layer in self.layers:
            x, logits, attention_logits = layer(
                x,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            states.append(x)
            routers.append(logits)
            if attention_logits is not None:
                attention_routers.append(attention_logits)
        x = self.norm(x)
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BamModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> BamCausalLMOutput:
        """input_ids [B, L] -> logits [B, L, V] (of the last `logits_to_keep` positions where that is given)."""
        kwargs.pop("return_dict", None)
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept]) * self.config.logit_scale
        loss = nll = None
        auxiliary = None
        if labels is not None:
            nll = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            auxiliary = routing_losses(out.router_logits, self.config.num_experts_per_tok)
            loss = nll
            if self.training:
                loss = (
                    nll
                    + self.config.router_aux_loss_coef * auxiliary.load_balance
                    + self.config.router_z_loss_coef * auxiliary.router_z
                )
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        return BamCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            nll=nll,
            load_balance_loss=auxiliary.load_balance if auxiliary else None,
            router_z_loss=auxiliary.router_z if auxiliary else None,
            router_logits=out.router_logits if wanted else None,
            attention_router_logits=out.attention_router_logits if wanted else None,
        )
