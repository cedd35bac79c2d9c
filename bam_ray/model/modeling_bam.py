"""The BAM mixture: FFN experts and soft attention experts over one dense transformer (arXiv 2408.08274).

Shapes: B batch, L length, T = B·L tokens, d hidden size, N experts, k experts a token, V vocabulary size.

The model does not depend on ranks. Tokens reach the experts through two seams, `BamExperts.dispatcher` and
`BamAttention.exchange`. By default all experts are on this rank; expert-parallel training replaces both seams by
collectives. The output of an attention may then be in flight while a parallel block computes its FFN.
"""

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
from .routing_bam import BamRouter, RouterOutput, RoutingLosses, routing_losses, select_experts, within_capacity
from .token_dispatch_bam import Overlap


class BamFFN(nn.Module):
    """A dense FFN: that of a dense layer, or the shared expert that all tokens use beside the routed experts."""

    def __init__(self, config: BamConfig, width: int) -> None:
        super().__init__()
        d, bias = config.hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, width, bias=bias) if config.mlp_gated else None
        self.up_proj = nn.Linear(d, width, bias=bias)
        self.down_proj = nn.Linear(width, d, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, x: Tensor, non_padding: Tensor | None = None, overlap: Overlap | None = None
    ) -> tuple[Tensor, None]:
        """Return the output [B, L, d] for x [B, L, d], and None: there is no router.

        `non_padding` and `overlap` are those of `BamMoE`. Nothing is sent, so `overlap` is called first.
        """
        if overlap is not None:
            overlap()
        up = self.up_proj(x)
        out: Tensor = self.down_proj(self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * up)
        return out, None


class BamMoE(nn.Module):
    """The FFN of a mixture layer: a router, its experts and, if the configuration has one, a shared expert."""

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

    def router_output(self, x: Tensor) -> RouterOutput:
        """Return the logits of tokens [T, d]; a noisy gate adds noise in training."""
        logits = self.gate(x)  # [T, N]
        if not self.training or self.gate.noise_weight is None:
            return RouterOutput(logits)
        scale = self.gate.noise_scale(x)  # [T, N]
        return RouterOutput(logits + torch.randn_like(logits) * scale, logits, scale)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the k experts of each token and their weights, both [T, k], for logits [T, N]."""
        probabilities = logits.softmax(-1)
        index = select_experts(probabilities, self.top_k, self.gate.selection_bias)
        weights = probabilities.gather(-1, index)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return index, weights * self.scale

    def forward(
        self, x: Tensor, non_padding: Tensor | None = None, overlap: Overlap | None = None
    ) -> tuple[Tensor, RouterOutput]:
        """Apply to each token the experts that its router selects.

        Args:
            x: The hidden states [B, L, d].
            non_padding: False for padding tokens [B, L]; None: there are none.
            overlap: Called once, while tokens are in flight to their experts.

        Returns:
            The output [B, L, d] and the router's output for the T tokens.
        """
        tokens = x.reshape(-1, x.shape[-1])  # [T, d]
        router = self.router_output(tokens)
        index, weights = self.route(router.logits)  # [T, k]
        kept = None
        if self.training and self.capacity_factor is not None:
            by_sequence = index.view(*x.shape[:-1], -1)  # [B, L, k]
            experts = router.logits.shape[-1]
            kept = within_capacity(by_sequence, experts, self.capacity_factor, non_padding).view_as(index)
        out = self.experts(tokens, index, weights, kept, overlap).view_as(x)  # [T, d] -> [B, L, d]
        return out if self.shared_expert is None else out + self.shared_expert(x)[0], router


class BamDecoderLayer(GradientCheckpointingLayer):
    """One block: parallel or sequential, with experts or dense."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        dense = layer_idx in (config.dense_layers or ())
        averaged = dense or config.attention_experts == "averaged"
        self.self_attn = (AveragedAttention if averaged else BamAttention)(config, layer_idx)
        width = config.dense_intermediate_size or config.intermediate_size
        self.mlp = BamFFN(config, width) if dense else BamMoE(config)
        self.parallel = config.parallel_block
        before = config.norm_placement == "before"
        ffn_norm = not self.parallel or config.separate_ffn_norm
        self.input_layernorm = block_norm(config) if before else None
        self.post_attention_layernorm = block_norm(config) if ffn_norm else None
        self.post_feedforward_layernorm = None if before else block_norm(config)

    def forward(
        self, x: Tensor, non_padding: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, RouterOutput | None, Tensor | None]:
        """Apply the block to x [B, L, d].

        In a parallel block the FFN calls `pending.compute` while its own tokens are in flight, and the FFN's experts
        run while the outputs of the attention experts are in flight.

        Args:
            x: The hidden states [B, L, d].
            non_padding: False for padding tokens [B, L]; None: there are none.
            kwargs: Passed to the attention.

        Returns:
            The hidden states [B, L, d], the output of the FFN router and the logits [T, N] of the attention router;
            None for a router that the layer does not have.
        """
        input_norm, inner_norm, output_norm = (
            self.input_layernorm,
            self.post_attention_layernorm,
            self.post_feedforward_layernorm,
        )
        attention_in = x if input_norm is None else input_norm(x)
        pending, attention_logits = self.self_attn(attention_in, **kwargs)
        if self.parallel:
            ffn_in = attention_in if inner_norm is None else inner_norm(x)
            ffn_out, router = self.mlp(ffn_in, non_padding, overlap=pending.compute)
            return x + pending.wait() + ffn_out, router, attention_logits
        assert inner_norm is not None, "a sequential block has a norm between attention and FFN"
        pending.compute()
        attention_out = pending.wait()
        if output_norm is None:  # norms before attention and FFN
            x = x + attention_out
            ffn_out, router = self.mlp(inner_norm(x), non_padding)
            return x + ffn_out, router, attention_logits
        x = x + inner_norm(attention_out)  # norms after attention and FFN
        ffn_out, router = self.mlp(x, non_padding)
        return x + output_norm(ffn_out), router, attention_logits


@dataclass
class BamModelOutput(ModelOutput):
    """The output of `BamModel`."""

    last_hidden_state: Tensor | None = None  # [B, L, d]
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # [B, L, d] before each layer, and after the last norm
    router_outputs: tuple[RouterOutput, ...] | None = None  # one for each layer with FFN experts
    attention_router_logits: tuple[Tensor, ...] | None = None  # [T, N] for each layer with attention experts


@dataclass
class BamCausalLMOutput(ModelOutput):
    """The output of `BamForCausalLM`.

    `loss` is `nll` in evaluation; in training the weighted auxiliary losses are added. The logits of the routers are
    None unless they are requested.
    """

    loss: Tensor | None = None  # scalar
    logits: Tensor | None = None  # [B, L, V]
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # those of `BamModelOutput`
    nll: Tensor | None = None  # scalar
    load_balance_loss: Tensor | None = None  # scalar
    router_z_loss: Tensor | None = None  # scalar
    router_logits: tuple[Tensor, ...] | None = None  # `RouterOutput.logits` [T, N] for each layer with FFN experts
    attention_router_logits: tuple[Tensor, ...] | None = None  # those of `BamModelOutput`; empty for BTX


MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def attention_masks(
    config: BamConfig,
    inputs_embeds: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
) -> dict[str, Tensor | None]:
    """Return the attention mask of each type of layer in `config.layer_types`.

    Without `attention_mask` and cache, positions [B, L] that restart within a sequence divide it into documents, and
    tokens attend only to their own document.
    """
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


def non_padding_tokens(attention_mask: Any, length: int) -> Tensor | None:
    """Return False for the padding among the last `length` tokens [B, length], or None if the mask is not [B, S]."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -length:].bool()


class BamPreTrainedModel(PreTrainedModel):
    """The base class that declares to transformers what the model supports, and that initializes its weights."""

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
                elif name == "noise_weight":  # zeros, like LLaMA-MoE
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
    """The mixture without its language-model head: embeddings, blocks and the last norm."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BamDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = block_norm(config)
        self.rotary_emb = BamRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    # transformers' own models have the same decorator.
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator] # untyped there
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
        """Compute the hidden states of `input_ids` [B, L] or `inputs_embeds` [B, L, d].

        `position_ids` is [1 or B, L]. `attention_mask` is [B, S], or already a mask for each type of layer, as
        `generate` makes it for a static cache.
        """
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
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            masks = attention_masks(self.config, inputs_embeds, position_ids, attention_mask, cache)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        non_padding = non_padding_tokens(attention_mask, inputs_embeds.shape[1])
        x = inputs_embeds
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states, routers, attention_routers = [x], [], []
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x, router, attention_logits = layer(
                x,
                non_padding=non_padding,
                position_embeddings=position_embeddings,
                attention_mask=masks[kind],
                position_ids=position_ids,
                cache=cache,
                **kwargs,
            )
            if keep_states:
                states.append(x)
            if router is not None:
                routers.append(router)
            if attention_logits is not None:
                attention_routers.append(attention_logits)
        x = self.norm(x)
        return BamModelOutput(
            last_hidden_state=x,
            cache=cache if use_cache else None,
            hidden_states=(*states[:-1], x) if keep_states else None,
            router_outputs=tuple(routers),
            attention_router_logits=tuple(attention_routers),
        )


class BamForCausalLM(BamPreTrainedModel, GenerationMixin):
    """The mixture with its language-model head."""

    # transformers declares this attribute without ClassVar.
    _tied_weights_keys: dict[str, str] = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (no ClassVar)

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config)
        self.model = BamModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def selection_biases(self) -> Tensor | None:
        """Return the selection biases [mixture layers, N], or None if the configuration has none."""
        if not self.config.selection_bias:
            return None
        return torch.stack([self.model.layers[layer].mlp.gate.selection_bias for layer in self.config.mixture_layers])

    # transformers' own models have the same decorator.
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator] # untyped there
    def forward(  # noqa: PLR0913 (the signature of transformers' causal language models)
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
        """Compute the logits [B, L, V] of `input_ids` [B, L] and, if there are `labels` [B, L], the loss.

        `logits_to_keep` limits the logits to that number of last positions, or to the positions of an index; 0 keeps
        all. `output_router_logits` adds the logits of the routers to the output. The other arguments are those of
        `BamModel`.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, positions]) * self.config.logit_scale
        loss = nll = None
        auxiliary = None
        if labels is not None:
            loss = nll = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            auxiliary = self.auxiliary_losses(out, attention_mask)
            if auxiliary and self.training:
                loss = (
                    nll
                    + self.config.router_aux_loss_coef * auxiliary.load_balance
                    + self.config.router_z_loss_coef * auxiliary.router_z
                )
        with_routers = self.config.output_router_logits if output_router_logits is None else output_router_logits
        return BamCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=out.cache,
            hidden_states=out.hidden_states,
            nll=nll,
            load_balance_loss=auxiliary.load_balance if auxiliary else None,
            router_z_loss=auxiliary.router_z if auxiliary else None,
            router_logits=tuple(router.logits for router in out.router_outputs) if with_routers else None,
            attention_router_logits=out.attention_router_logits if with_routers else None,
        )

    def auxiliary_losses(self, out: BamModelOutput, attention_mask: Any) -> RoutingLosses | None:
        """Return the losses of the FFN routers, or None if no layer has one."""
        if not out.router_outputs:
            return None
        assert out.last_hidden_state is not None
        non_padding = non_padding_tokens(attention_mask, out.last_hidden_state.shape[1])
        return routing_losses(
            out.router_outputs,
            self.config.num_experts_per_tok,
            non_padding=None if non_padding is None else non_padding.flatten(),  # [B, L] -> [T]
            bias=self.selection_biases(),
        )
