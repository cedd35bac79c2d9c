"""The BAM mixture: FFN experts and soft attention experts over one dense transformer (arXiv 2408.08274).

Shapes: B batch, L length, T = B·L tokens, d hidden, N experts, k experts a token, V vocabulary.

The model knows nothing of ranks. Tokens reach their experts through two seams, `BamExperts.dispatcher` and
`BamAttentionExperts.exchange`: here they stay in place; expert-parallel training puts collectives in their place. What
an exchange gives may be under way until it has passed `BamDecoderLayer.arrived`, in a parallel block beside the FFN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg

from .attention_bam import (
    AveragedAttention,
    BamAttention,
    BamAttentionExperts,
    BamNorm,
    BamRotaryEmbedding,
    block_norm,
)
from .configuration_bam import BamConfig
from .experts_bam import BamExperts
from .routing_bam import BamRouter, choose, routing_losses, within_capacity


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
