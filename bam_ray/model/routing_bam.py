"""The routers of a mixture: their logits, the experts that these select, and the losses that balance the experts.

Shapes: T tokens, L length of a sequence, d hidden size, N experts, k experts a token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from .configuration_bam import BamConfig
from .prefix_bam import RoutingContext


class RouterOutput(NamedTuple):
    """The output of the FFN router of one layer for T tokens.

    The last two fields are None unless the layer has a noisy gate and is in training.
    """

    logits: Tensor  # [T, N] logits by which experts are selected, including the noise of a noisy gate
    clean_logits: Tensor | None = None  # [T, N] logits without noise
    noise_scale: Tensor | None = None  # [T, N] standard deviation of the noise


@dataclass(frozen=True)
class RoutingLosses:
    """The auxiliary losses of the FFN routers, summed over layers, and the statistics that they were computed from."""

    load_balance: Tensor  # scalar
    router_z: Tensor  # scalar
    share: Tensor  # [layers, N], no gradient: fraction of all choices that selected each expert
    chosen: Tensor  # [layers, T, k], no gradient: experts of each token
    entropy: Tensor  # [layers, T], no gradient: entropy of each token's probabilities, in nats


def routing_losses(
    routers: Sequence[RouterOutput],
    top_k: int,
    reduce: Callable[[Tensor], Tensor] | None = None,
    non_padding: Tensor | None = None,
    bias: Tensor | None = None,
) -> RoutingLosses:
    """Compute the load-balance loss and the z-loss of FFN routers, summed over layers.

    `L_LB = N · Σ_i f_i · P_i`, where f_i is the fraction of all choices that selected expert i (no gradient) and P_i
    its mean probability (Switch, arXiv 2101.03961; 1 if balanced). `L_z = mean (logsumexp logits)²` (ST-MoE, arXiv
    2202.08906). For noisy gates in training, `L_LB` is `noisy_balance_loss` (LLaMA-MoE; 0 if balanced).

    Args:
        routers: The output of each layer's router.
        top_k: k.
        reduce: Averages a tensor over data-parallel ranks, so that the mean of the ranks' losses is the loss of the
            global batch. None: there is one rank.
        non_padding: False for padding tokens, which are left out [T]; None: there are none.
        bias: The selection biases [layers, N]; None: there are none.
    """
    logits = stack_layers([router.logits for router in routers], non_padding)  # [layers, T, N]
    clean = [router.clean_logits for router in routers if router.clean_logits is not None]
    scales = [router.noise_scale for router in routers if router.noise_scale is not None]
    clean_logits = stack_layers(clean, non_padding) if clean else logits  # [layers, T, N]
    experts = logits.shape[-1]
    probabilities = logits.softmax(-1)
    chosen = select_experts(probabilities.detach(), top_k, None if bias is None else bias.unsqueeze(1))
    share = F.one_hot(chosen, experts).float().mean((1, 2))  # [layers, T, k, N] -> [layers, N]
    if reduce is not None:
        share = reduce(share)
    if scales:
        load_balance = noisy_balance_loss(logits, clean_logits, stack_layers(scales, non_padding), top_k, reduce)
    else:
        load_balance = experts * (share * probabilities.mean(1)).sum()
    router_z = clean_logits.logsumexp(-1).square().mean(1).sum()
    entropy = torch.special.entr(probabilities.detach()).sum(-1)
    return RoutingLosses(load_balance, router_z, share, chosen, entropy)


def stack_layers(logits: Sequence[Tensor], non_padding: Tensor | None) -> Tensor:
    """Stack one [T, N] of each layer to [layers, T, N] in fp32, without the tokens that are padding."""
    stacked = torch.stack(tuple(logits)).float()
    return stacked if non_padding is None else stacked[:, non_padding]


def select_experts(probabilities: Tensor, top_k: int, bias: Tensor | None = None) -> Tensor:
    """Return the k experts [..., T, k] with the largest sum of probability [..., T, N] and selection bias [..., N]."""
    return (probabilities if bias is None else probabilities + bias).topk(top_k, dim=-1).indices


def keep_top(gates: Tensor, top_k: int) -> Tensor:
    """Return gates [..., N] in which all but the k largest are 0; 0 keeps all. The rest is not renormalized."""
    if not top_k:
        return gates
    return gates * torch.zeros_like(gates).scatter(-1, gates.topk(top_k, dim=-1).indices, 1.0)


def within_capacity(index: Tensor, experts: int, factor: float, non_padding: Tensor | None = None) -> Tensor:
    """Return True for the choices of sequences that are within the capacity of their experts.

    The capacity of an expert is `⌈factor · k · L / N⌉` tokens of a sequence (that of Switch, with a sequence as
    GShard's group), and the first tokens of the sequence have priority. So the dropped choices depend neither on the
    micro-batch nor on the number of ranks, and never on later tokens. With GShard's order, all first choices before all
    second choices, a later token could displace the second choice of an earlier one.

    Args:
        index: The experts of each token [..., L, k].
        experts: N.
        factor: The capacity factor.
        non_padding: False for padding tokens [..., L]: they do not count as tokens of the sequence, use no capacity,
            and their choices are dropped. None: there are none.

    Returns:
        A bool for each choice: [..., L, k].
    """
    chosen = F.one_hot(index, experts).sum(-2)  # [..., L, k, N] -> [..., L, N], 0 or 1
    share = factor * index.shape[-1] / experts
    # Rounding keeps ⌈ ⌉ from adding one if the product exceeds a whole number by a rounding error only.
    capacity: int | Tensor = math.ceil(round(share * index.shape[-2], 6))
    if non_padding is not None:
        chosen = chosen * non_padding.unsqueeze(-1)
        capacity = (share * non_padding.sum(-1)[..., None, None].double()).round(decimals=6).ceil()  # [..., 1, 1]
    before = (chosen.cumsum(-2) - chosen).gather(-1, index)  # [..., L, k] earlier tokens that selected the same expert
    kept = before < capacity
    return kept if non_padding is None else kept & non_padding.unsqueeze(-1)


def dropped_share(chosen: Tensor, config: BamConfig, sequences: int) -> Tensor:
    """Return the fraction of each layer's choices that exceed the capacity of their experts in training: [layers].

    `chosen` [layers, T, k] are the experts of the tokens of `sequences` sequences, all of the same length.
    """
    if config.capacity_factor is None:
        return torch.zeros(len(chosen), device=chosen.device)
    by_sequence = chosen.unflatten(1, (sequences, -1))  # [layers, B·L, k] -> [layers, B, L, k]
    kept = within_capacity(by_sequence, config.num_experts, config.capacity_factor)
    return 1.0 - kept.float().mean((1, 2, 3))


def noisy_balance_loss(
    noisy: Tensor, clean: Tensor, scale: Tensor, top_k: int, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return LLaMA-MoE's balance loss of noisy gates, summed over layers.

    It is `CV²(importance) + CV²(load)` (arXiv 1701.06538). The importance of an expert is its mean gate, with a softmax
    over the k selected experts. Its load is the mean probability that it would be selected if its own noise were drawn
    again, which has a gradient. Both are those of the global batch; the gradient on each rank is that of its own
    tokens.

    Args:
        noisy: The logits with noise [layers, T, N].
        clean: The logits without noise [layers, T, N].
        scale: The standard deviation of the noise [layers, T, N].
        top_k: k.
        reduce: See `routing_losses`.
    """
    experts = noisy.shape[-1]
    highest, index = noisy.topk(min(top_k + 1, experts), dim=-1)  # [layers, T, k + 1]
    gates = torch.zeros_like(noisy).scatter(-1, index[..., :top_k], highest[..., :top_k].softmax(-1))
    if top_k < experts:
        last_selected, first_rejected = highest[..., top_k - 1 : top_k], highest[..., top_k:]  # [layers, T, 1]
        # The k-th highest logit of all other experts: [layers, T, N].
        threshold = torch.where(noisy > first_rejected, first_rejected, last_selected)
        load = torch.special.ndtr((clean - threshold) / scale)
    else:
        load = torch.ones_like(noisy)
    total = noisy.new_zeros(())
    for part in (gates, load):
        mean = part.mean(1)  # [layers, N]
        if reduce is not None:
            # The value of the global mean with the gradient of this rank's mean.
            mean = mean + (reduce(mean.detach().clone()) - mean.detach())
        total = total + (mean.var(-1) / (mean.mean(-1).square() + 1e-10)).sum()
    return total


class BamRouter(nn.Module):
    """A linear router without bias, computed in fp32 even under autocast."""

    selection_bias: Tensor | None

    def __init__(self, config: BamConfig, noisy: bool = False, biased: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.noise_weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size)) if noisy else None
        self.register_buffer("selection_bias", torch.zeros(config.num_experts) if biased else None)
        self.reads_prefix = config.router_input == "prefix"
        self.number = 0  # among all routers of the model

    def forward(self, x: Tensor, routing: RoutingContext | None = None) -> Tensor:
        """Return the logits [..., N] of hidden states [..., d], which depend on the documents so far with `routing`.

        Only routers of single tokens without a prior work without `routing`. With it, x has the B·L tokens of a forward
        pass, as [B, L, d] or [T, d].
        """
        logits = self.linear(x, self.weight)
        if routing is None:
            return logits
        by_document = logits.view(*routing.shape, -1)  # [B, L, N]
        if self.reads_prefix:
            by_document = routing.mean_logits(by_document, self.number)
        if routing.prior is not None:
            by_document = by_document + routing.prior
        return by_document.reshape(logits.shape)

    def noise_scale(self, x: Tensor) -> Tensor:
        """Return the standard deviation [..., N] of the noise on each logit of x [..., d] (with LLaMA-MoE's offset)."""
        assert self.noise_weight is not None
        return F.softplus(self.linear(x, self.noise_weight)) + 1e-2

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x [..., d] times the transposed weight [N, d], in fp32: [..., N]."""
        with maybe_autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight.float())
