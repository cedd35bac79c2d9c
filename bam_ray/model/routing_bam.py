"""Routers of a mixture: their logits, which experts these choose, and the losses that keep experts busy.

Shapes: T tokens, d hidden, N experts, k experts a token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from .configuration_bam import BamConfig


@dataclass(frozen=True)
class RoutingLosses:
    """Auxiliary losses of the FFN routers, each summed over layers, and what they were computed from, by layer."""

    load_balance: Tensor  # scalar
    router_z: Tensor  # scalar
    share: Tensor  # [layers, N], no gradient: of all choices
    chosen: Tensor  # [layers, T, k], no gradient: each token's experts
    entropy: Tensor  # [layers, T], no gradient: that of a token's probabilities, in nats


def routing_losses(
    router_logits: tuple[Tensor, ...],
    top_k: int,
    reduce: Callable[[Tensor], Tensor] | None = None,
    real: Tensor | None = None,
    bias: Tensor | None = None,
) -> RoutingLosses:
    """Load-balance and z-loss of FFN routers, summed over layers.

    `L_LB = N · Σ_i f_i · P_i`, with f_i the fraction of all choices that fell on expert i (no gradient) and P_i its
    mean probability (Switch; 1 when balanced); `L_z = mean (logsumexp logits)²` (ST-MoE).

    Of noisy gates in training, `L_LB = CV²(importance) + CV²(load)` (LLaMA-MoE; 0 when balanced), see `noisy_balance`.

    `router_logits`: one [T, N] a layer, or [3, T, N] of noisy gates in training (`BamMoE.forward`). `reduce` averages
    over data-parallel ranks, so that their mean loss is the loss of the global batch. `real` [T]: padding tokens, which
    are left out, are False. `bias` [layers, N]: the selection biases, where there are any.
    """
    logits = torch.stack(router_logits).float()  # [layers, T, N], or [layers, 3, T, N]
    if real is not None:
        logits = logits[..., real, :]
    noisy = logits.ndim == 4
    routed, clean = (logits[:, 0], logits[:, 1]) if noisy else (logits, logits)
    experts = logits.shape[-1]
    probabilities = routed.softmax(-1)
    chosen = choose(probabilities.detach(), top_k, None if bias is None else bias.unsqueeze(1))  # [layers, T, k]
    share = F.one_hot(chosen, experts).float().mean((1, 2))  # [layers, N]
    if reduce is not None:
        share = reduce(share)
    if noisy:
        load_balance = noisy_balance(routed, clean, logits[:, 2], top_k, reduce)
    else:
        load_balance = experts * (share * probabilities.mean(1)).sum()
    router_z = clean.logsumexp(-1).square().mean(1).sum()
    entropy = torch.special.entr(probabilities.detach()).sum(-1)
    return RoutingLosses(load_balance, router_z, share, chosen, entropy)


def choose(probabilities: Tensor, top_k: int, bias: Tensor | None = None) -> Tensor:
    """The k experts of each token, by probability [..., T, N] and the selection bias [..., N]: [..., T, k]."""
    return (probabilities if bias is None else probabilities + bias).topk(top_k, dim=-1).indices


def within_capacity(index: Tensor, experts: int, factor: float, real: Tensor | None = None) -> Tensor:
    """Which choices [..., L, k] of sequences find room with their experts: bool [..., L, k].

    An expert takes `⌈factor · k · L / N⌉` tokens of a sequence, those that come first (Switch's capacity, a sequence
    being GShard's group): who is dropped depends on neither the micro batch nor the ranks, and never on later tokens,
    which GShard's "first choices first" would let push out earlier ones' second choices. Padding (`real` [..., L] is
    False) takes no room, is none of the L tokens, and finds no expert.
    """
    chosen = F.one_hot(index, experts).sum(-2)  # [..., L, N]: 0 or 1
    share = factor * index.shape[-1] / experts
    room: int | Tensor = math.ceil(round(share * index.shape[-2], 6))  # what rounding adds to a whole number is no room
    if real is not None:
        chosen = chosen * real.unsqueeze(-1)
        room = (share * real.sum(-1)[..., None, None].double()).round(decimals=6).ceil()
    before = (chosen.cumsum(-2) - chosen).gather(-1, index)  # tokens that the same expert was chosen by
    kept = before < room
    return kept if real is None else kept & real.unsqueeze(-1)


def dropped_share(chosen: Tensor, config: BamConfig, sequences: int) -> Tensor:
    """Which share of the choices [layers, T, k] of `sequences` of one length found no room in training: [layers]."""
    if config.capacity_factor is None:
        return torch.zeros(len(chosen), device=chosen.device)
    kept = within_capacity(chosen.unflatten(1, (sequences, -1)), config.num_experts, config.capacity_factor)
    return 1.0 - kept.float().mean((1, 2, 3))


def noisy_balance(
    noisy: Tensor, clean: Tensor, scale: Tensor, top_k: int, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """LLaMA-MoE's balance loss, summed over layers, from logits with and without noise and its scale: [layers, T, N].

    `CV²(importance) + CV²(load)` (arXiv 1701.06538): importance is an expert's mean gate, a softmax over the k chosen;
    load the mean probability that it is among the k when its own noise is drawn again, which has a gradient. Both are
    those of the global batch; each rank's gradient is that of its own tokens' part.
    """
    experts = noisy.shape[-1]
    highest, index = noisy.topk(min(top_k + 1, experts), dim=-1)
    gates = torch.zeros_like(noisy).scatter(-1, index[..., :top_k], highest[..., :top_k].softmax(-1))
    if top_k < experts:
        least_in, best_out = highest[..., top_k - 1 : top_k], highest[..., top_k:]
        rival = torch.where(noisy > best_out, best_out, least_in)  # the k-th highest of the others
        load = torch.special.ndtr((clean - rival) / scale)
    else:
        load = torch.ones_like(noisy)
    total = noisy.new_zeros(())
    for part in (gates, load):
        mean = part.mean(1)  # [layers, N]
        if reduce is not None:
            mean = mean + (reduce(mean.detach().clone()) - mean.detach())
        total = total + (mean.var(-1) / (mean.mean(-1).square() + 1e-10)).sum()
    return total


class BamRouter(nn.Module):
    """A linear router without bias: [..., d] -> logits [..., N], in fp32 whatever autocast says."""

    selection_bias: Tensor | None

    def __init__(self, config: BamConfig, noisy: bool = False, biased: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.noise_weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size)) if noisy else None
        self.register_buffer("selection_bias", torch.zeros(config.num_experts) if biased else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight)

    def noise_scale(self, x: Tensor) -> Tensor:
        """The standard deviation of the noise on each logit, [..., d] -> [..., N] (constants are LLaMA-MoE's)."""
        assert self.noise_weight is not None
        return F.softplus(self.linear(x, self.noise_weight)) + 1e-2

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        with maybe_autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight.float())
