"""The BAM mixture: FFN experts and soft attention experts over one dense transformer (arXiv 2408.08274).

Shapes: B batch, L length, S number of keys, T = B·L tokens, d hidden size, N experts, V vocabulary size.

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
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg

from .attention_bam import BamAttentionExperts, BamNorm, BamRotaryEmbedding, block_norm
from .configuration_bam import BamConfig
from .embeddings_bam import BamHead, BamHeadGate, BamInputEmbeddings, BamTables
from .experts_bam import BamExperts
from .layers_bam import BamDecoderLayer
from .prefix_bam import (
    BigramCounts,
    BigramPrior,
    Documents,
    RoutingContext,
    existing_routing_state,
    routing_state,
)
from .routing_bam import BamRouter, RouterOutput, RoutingLosses, routing_losses


@dataclass
class BamModelOutput(ModelOutput):
    """The output of `BamModel`."""

    last_hidden_state: Tensor | None = None  # [B, L, d]
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # [B, L, d] before each layer, and after the last norm
    router_outputs: tuple[RouterOutput, ...] | None = None  # one for each layer with FFN experts
    attention_router_logits: tuple[Tensor, ...] | None = None  # [T, N] for each layer with attention experts
    head_gates: Tensor | None = None  # [B, L, N] gates of the output head, with embedding experts


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
    attention_mask: Tensor | dict[str, Tensor | None] | None = None,
    cache: Cache | None = None,
) -> dict[str, Tensor | None]:
    """Return the attention mask of each type of layer in `config.layer_types`.

    Without `attention_mask` and cache, positions [B, L] that restart within a sequence divide it into documents, and
    tokens attend only to their own document. Masks that exist already are returned unchanged.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    return {
        # By position, because the fourth parameter has another name in earlier versions of transformers
        kind: MASKS[kind](config, inputs_embeds, attention_mask, cache, position_ids=position_ids)
        for kind in sorted(set(config.layer_types or ()))
    }


def following_positions(given: Tensor, cache: Cache | None) -> Tensor:
    """Return the positions [1, L] of the input [B, L, ...] after the tokens of the cache."""
    seen = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(given.shape[1], device=given.device) + seen).unsqueeze(0)


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
        if isinstance(module, BamExperts | BamAttentionExperts | BamRouter | BamTables | BigramCounts):
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
        with_tables = config.embeddings == "experts"
        self.embed_tokens: nn.Embedding | BamInputEmbeddings = (
            BamInputEmbeddings(config)
            if with_tables
            else nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        )
        self.layers = nn.ModuleList(BamDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = block_norm(config)
        self.head = BamHeadGate(config) if with_tables else None
        self.prior = BigramPrior(config) if config.router_prior == "bigram" else None
        self.rotary_emb = BamRotaryEmbedding(config)
        routers = [module for module in self.modules() if isinstance(module, BamRouter)]
        for number, router in enumerate(routers):
            router.number = number
        self.routers = len(routers)
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
        `generate` makes it for a static cache. `router_prior` [B, N] replaces the router prior by the logarithm of a
        weight for each expert, except for sequences where it is NaN.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = following_positions(given, cache)
        non_padding = non_padding_tokens(attention_mask, given.shape[1])
        given_prior = kwargs.pop("router_prior", None)
        routing = self.routing_context(input_ids, given, position_ids, non_padding, cache, given_prior)
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, routing)
        masks = attention_masks(self.config, inputs_embeds, position_ids, attention_mask, cache)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        x = inputs_embeds
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states, routers, attention_routers = [x], [], []
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x, router, attention_logits = layer(
                x,
                non_padding=non_padding,
                routing=routing,
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
        head_gates = None if self.head is None else self.head(x, routing)
        if routing is not None and cache is not None:
            routing_state(cache).write(routing.seen(input_ids, self.config.num_experts))
        return BamModelOutput(
            last_hidden_state=x,
            cache=cache if use_cache else None,
            hidden_states=(*states[:-1], x) if keep_states else None,
            router_outputs=tuple(routers),
            attention_router_logits=tuple(attention_routers),
            head_gates=head_gates,
        )

    def embed(self, input_ids: Tensor | None, routing: RoutingContext | None) -> Tensor:
        """Return the embeddings [B, L, d] of `input_ids` [B, L]."""
        with_tables = isinstance(self.embed_tokens, BamInputEmbeddings)
        x: Tensor = self.embed_tokens(input_ids, routing) if with_tables else self.embed_tokens(input_ids)
        return x

    def routing_context(
        self,
        input_ids: Tensor | None,
        given: Tensor,
        position_ids: Tensor,
        non_padding: Tensor | None,
        cache: Cache | None,
        given_prior: Tensor | None = None,
    ) -> RoutingContext | None:
        """Return what the routers know of the documents so far, or None if they read single tokens without a prior.

        `given` [B, L, ...] is the input of the model, token ids or their embeddings, and `given_prior` [B, N] replaces
        the router prior (`RoutingContext.replace_prior`).
        """
        if given_prior is not None and self.prior is None:
            raise ValueError("router_prior needs a mixture with a router prior: omit it")
        if not self.config.routes_by_prefix:
            return None
        state = None if cache is None else existing_routing_state(cache)
        seen = None if state is None else state.read()
        documents = Documents(position_ids, non_padding, seen is not None, self.config.router_forgetting)
        routing = RoutingContext(documents, seen, given.shape[:2], given.device, self.routers)
        if self.prior is not None:
            if input_ids is None:
                raise ValueError("the router prior is computed from token ids: give input_ids, not inputs_embeds")
            routing.add_prior(self.prior, input_ids)
            if given_prior is not None:
                routing.replace_prior(given_prior)
        return routing


class BamForCausalLM(BamPreTrainedModel, GenerationMixin):
    """The mixture with its language-model head."""

    # transformers declares this attribute without ClassVar.
    _tied_weights_keys: dict[str, str] = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (no ClassVar)

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config)
        self.model = BamModel(config)
        self.lm_head: nn.Linear | BamHead
        if config.embeddings == "experts":
            self.lm_head = BamHead(config)
            self._tied_weights_keys = {"lm_head.experts.weight": "model.embed_tokens.experts.weight"}
        else:
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
        gates = () if out.head_gates is None else (out.head_gates[:, positions],)
        logits = self.lm_head(out.last_hidden_state[:, positions], *gates) * self.config.logit_scale
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
