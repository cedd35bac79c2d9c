"""The experts that computed each generated token, for clients that request them.

A token is computed by the forward pass at the position before it. Its routing is that of this position.

Shapes: B batch, L length, N experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bam_ray.model import BamConfig, BamForCausalLM

DIGITS = 3  # decimal places of a share

Shares = tuple[tuple[float, ...], ...]  # [layers][N]


@dataclass(frozen=True)
class TokenRouting:
    """The share of each expert in the layers that computed one token. The shares of a layer sum to 1."""

    ffn: Shares  # of the layers with FFN experts; 0 for experts that were not selected
    attention: Shares  # of the layers with attention experts: their gates
    text: str = ""  # the text that the token added to the output


@dataclass(frozen=True)
class RoutingLayout:
    """The experts of a mixture, and its layers that have them."""

    experts: tuple[str, ...]
    ffn_layers: tuple[int, ...]
    attention_layers: tuple[int, ...]

    @classmethod
    def of(cls, config: Any) -> "RoutingLayout | None":
        """Return the layout of a mixture, or None for any other model."""
        if not isinstance(config, BamConfig) or not config.mixture_layers:
            return None
        layers = tuple(config.mixture_layers)
        experts = config.expert_names or [str(expert) for expert in range(config.num_experts)]
        return cls(tuple(experts), layers, () if config.attention_experts == "averaged" else layers)


class RoutingReader:
    """Reads the routing at the last position of each row from the output of a mixture."""

    def __init__(self, model: BamForCausalLM) -> None:
        layers = [model.model.layers[index] for index in model.config.mixture_layers]
        self._ffn = [layer.mlp for layer in layers]
        self._attention = [] if model.config.attention_experts == "averaged" else [layer.self_attn for layer in layers]

    def __call__(self, output: Any, batch: int) -> list[TokenRouting]:
        """Return the routing of each of the B rows.

        Args:
            output: The output of the model with `output_router_logits=True`.
            batch: B.
        """
        shares = []  # [B, N] each
        for moe, logits in zip(self._ffn, output.router_logits, strict=True):
            last = _last(logits, batch)
            index, weights = moe.route(last)
            shares.append(torch.zeros_like(last).scatter(-1, index, weights))
        for attention, logits in zip(self._attention, output.attention_router_logits, strict=True):
            shares.append(attention.gates(_last(logits, batch)))
        stacked = torch.stack(shares, dim=1)  # [B, layers, N]
        rows = (stacked / stacked.sum(-1, keepdim=True)).tolist()
        layers = len(self._ffn)
        return [TokenRouting(_rounded(row[:layers]), _rounded(row[layers:])) for row in rows]


def _last(logits: Tensor, batch: int) -> Tensor:
    """Return the logits [B, N] of the last position of each row, for logits [B·L, N]."""
    return logits.view(batch, -1, logits.shape[-1])[:, -1].float()


def _rounded(layers: list[list[float]]) -> Shares:
    return tuple(tuple(round(share, DIGITS) for share in layer) for layer in layers)
