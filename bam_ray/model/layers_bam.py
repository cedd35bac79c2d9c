"""The blocks of a mixture: dense FFNs, routed FFN experts, and the layer that combines them with an attention.

Shapes: B batch, L length, T = B·L tokens, d hidden size, N experts, k experts a token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_bam import AveragedAttention, BamAttention, block_norm
from .configuration_bam import BamConfig
from .experts_bam import BamExperts
from .prefix_bam import RoutingContext
from .routing_bam import BamRouter, RouterOutput, select_experts, within_capacity
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
        self,
        x: Tensor,
        non_padding: Tensor | None = None,
        overlap: Overlap | None = None,
        routing: RoutingContext | None = None,
    ) -> tuple[Tensor, None]:
        """Return the output [B, L, d] for x [B, L, d], and None: there is no router.

        The other arguments are those of `BamMoE`. Nothing is sent, so `overlap` is called first.
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

    def router_output(self, x: Tensor, routing: RoutingContext | None) -> RouterOutput:
        """Return the logits of tokens [T, d]; a noisy gate adds noise in training."""
        logits = self.gate(x, routing)  # [T, N]
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
        self,
        x: Tensor,
        non_padding: Tensor | None = None,
        overlap: Overlap | None = None,
        routing: RoutingContext | None = None,
    ) -> tuple[Tensor, RouterOutput]:
        """Apply to each token the experts that its router selects.

        Args:
            x: The hidden states [B, L, d].
            non_padding: False for padding tokens [B, L]; None: there are none.
            overlap: Called once, while tokens are in flight to their experts.
            routing: What routers know of the documents so far; None: they read single tokens.

        Returns:
            The output [B, L, d] and the router's output for the T tokens.
        """
        tokens = x.reshape(-1, x.shape[-1])  # [T, d]
        router = self.router_output(tokens, routing)
        index, weights = self.route(router.logits)  # [T, k]
        kept = None
        if self.training and self.capacity_factor is not None:
            by_sequence = index.view(*x.shape[:-1], -1)  # [B, L, k]
            experts = router.logits.shape[-1]
            kept = within_capacity(by_sequence, experts, self.capacity_factor, non_padding).view_as(index)
        out = self.experts(tokens, index, weights, kept=kept, overlap=overlap).view_as(x)  # [T, d] -> [B, L, d]
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
        self, x: Tensor, non_padding: Tensor | None = None, routing: RoutingContext | None = None, **kwargs: Any
    ) -> tuple[Tensor, RouterOutput | None, Tensor | None]:
        """Apply the block to x [B, L, d].

        In a parallel block the FFN calls `pending.compute` while its own tokens are in flight, and the FFN's experts
        run while the outputs of the attention experts are in flight.

        Args:
            x: The hidden states [B, L, d].
            non_padding: False for padding tokens [B, L]; None: there are none.
            routing: What routers know of the documents so far; None: they read single tokens.
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
        pending, attention_logits = self.self_attn(attention_in, routing, **kwargs)
        if self.parallel:
            ffn_in = attention_in if inner_norm is None else inner_norm(x)
            ffn_out, router = self.mlp(ffn_in, non_padding, pending.compute, routing)
            return x + pending.result() + ffn_out, router, attention_logits  # other engines' experts do not overlap
        assert inner_norm is not None, "a sequential block has a norm between attention and FFN"
        attention_out = pending.result()
        if output_norm is None:  # norms before attention and FFN
            x = x + attention_out
            ffn_out, router = self.mlp(inner_norm(x), non_padding, routing=routing)
            return x + ffn_out, router, attention_logits
        x = x + inner_norm(attention_out)  # norms after attention and FFN
        ffn_out, router = self.mlp(x, non_padding, routing=routing)
        return x + output_norm(ffn_out), router, attention_logits
