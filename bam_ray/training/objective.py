"""The training objective: next-token NLL, and for mixtures the auxiliary losses of the routers.

Shapes: B sequences of L tokens, D domains, M layers with experts, N experts, k experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.model import BamForCausalLM, RoutingLosses, dropped_share, routing_losses
from bam_ray.settings import Losses


@dataclass(frozen=True)
class ExpertLoad:
    """The routing of a batch's tokens to the FFN experts of all layers that have experts.

    Every mean over the batch is split into the contributions of the domains. The mean of one domain is its
    contribution divided by the share of the batch that belongs to the domain.
    """

    choices: Tensor  # [M, D, N]: shares of all choices
    entropy: Tensor  # [M, D]: entropy of a token's router probabilities, in nats
    dropped: Tensor  # [M]: share of all choices that exceeded an expert's capacity

    @property
    def share(self) -> Tensor:
        """Each expert's share of all choices: [M, N]."""
        return self.choices.sum(1)


@dataclass(frozen=True)
class BatchStatistics:
    """The losses and the expert load of a batch: detached means over its sequences.

    `pack` makes one vector of them, so that one operation adds two micro batches, and one collective averages over all
    ranks.
    """

    nll: Tensor  # nats per token
    load_balance: Tensor
    router_z: Tensor
    load: ExpertLoad | None  # None: the model has no experts

    def losses(self) -> tuple[float, float, float]:
        """Return NLL, load-balance loss and router z-loss; waits for the device once."""
        nll, load_balance, router_z = torch.stack((self.nll, self.load_balance, self.router_z)).tolist()
        return nll, load_balance, router_z

    def pack(self) -> Tensor:
        """Return all values as one vector [3 + M·(1 + D·(N + 1))]; without experts it is [3]."""
        losses = torch.stack((self.nll, self.load_balance, self.router_z))
        if self.load is None:
            return losses
        by_domain = torch.cat((self.load.choices, self.load.entropy.unsqueeze(-1)), dim=-1)  # [M, D, N + 1]
        by_layer = torch.cat((self.load.dropped.unsqueeze(1), by_domain.flatten(1)), dim=1)  # [M, 1 + D·(N + 1)]
        return torch.cat((losses, by_layer.flatten()))

    @staticmethod
    def unpack(packed: Tensor, mixture: BamForCausalLM | None) -> "BatchStatistics":
        """Return the statistics that `pack` packed; `mixture` is the model, or None for a dense model."""
        load = None
        if mixture is not None:
            by_layer = packed[3:].view(len(mixture.config.mixture_layers), -1)
            by_domain = by_layer[:, 1:].unflatten(1, (-1, mixture.config.num_experts + 1))
            load = ExpertLoad(by_domain[..., :-1], by_domain[..., -1], by_layer[:, 0])
        return BatchStatistics(packed[0], packed[1], packed[2], load)


@dataclass(frozen=True)
class Objective:
    """The training loss of one micro batch."""

    total: Tensor  # NLL plus the weighted auxiliary losses: the value to differentiate
    statistics: BatchStatistics


def objective(
    model: torch.nn.Module,
    input_ids: Tensor,
    losses: Losses,
    mixture: BamForCausalLM | None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    domains: Tensor | None = None,
) -> Objective:
    """Compute the training loss of `input_ids` [B, L].

    Args:
        model: The module to call: a `NextTokenLoss`, or an engine that wraps one.
        input_ids: Token ids [B, L].
        losses: Coefficients of the auxiliary losses, without ramps (`Losses.at`).
        mixture: The mixture that `model` computes, or None for a dense model.
        reduce: Averages routing statistics over data-parallel ranks (`model.routing_losses`).
        domains: [B, D], 1 if a sequence belongs to a domain, else 0. None: all sequences belong to a single domain.
    """
    nll, routers = model(input_ids)
    if mixture is None:
        zero = torch.zeros((), device=nll.device)
        return Objective(nll, BatchStatistics(nll.detach(), zero, zero, None))
    biases = mixture.selection_biases()
    routing = routing_losses(routers, mixture.config.num_experts_per_tok, reduce, bias=biases)
    load = _expert_load(routing, mixture, single_domain(input_ids) if domains is None else domains)
    load_balance, router_z = losses.load_balance, losses.router_z
    assert isinstance(load_balance, float) and isinstance(router_z, float), "ramps are not allowed: use Losses.at"
    total = nll + load_balance * routing.load_balance + router_z * routing.router_z
    statistics = BatchStatistics(nll.detach(), routing.load_balance.detach(), routing.router_z.detach(), load)
    return Objective(total, statistics)


def _expert_load(routing: RoutingLosses, mixture: BamForCausalLM, domains: Tensor) -> ExpertLoad:
    """Return the load of the sequences whose domains are `domains` [B, D]."""
    sequences, config = len(domains), mixture.config
    chosen = F.one_hot(routing.chosen.unflatten(1, (sequences, -1)), config.num_experts)  # [M, B, L, k, N]
    choices = chosen.float().mean((2, 3))
    entropy = routing.entropy.unflatten(1, (sequences, -1)).mean(2, keepdim=True)  # [M, B, 1]
    by_sequence = torch.cat((choices, entropy), dim=-1).unsqueeze(2)  # [M, B, 1, N + 1]
    # A matrix product would do the same, but a GPU may round it more
    by_domain = (by_sequence * domains.unsqueeze(-1)).mean(1).detach()  # [M, D, N + 1]
    dropped = dropped_share(routing.chosen, config, sequences)
    return ExpertLoad(by_domain[..., :-1], by_domain[..., -1], dropped)


def single_domain(input_ids: Tensor) -> Tensor:
    """Return the domains [B, 1] of sequences [B, L] that all belong to a single domain."""
    return input_ids.new_ones(len(input_ids), 1)


def as_mixture(model: PreTrainedModel) -> BamForCausalLM | None:
    """Return `model` if it is a mixture with a layer that has experts, else None."""
    return model if isinstance(model, BamForCausalLM) and model.config.mixture_layers else None


@torch.no_grad()
def update_selection_biases(mixture: BamForCausalLM | None, load: ExpertLoad | None, rate: float) -> None:
    """Move every selection bias by `rate`, so that experts with too small a share of the choices are chosen more often.

    The bias goes up if the expert's share of the last batch's choices is below an even share, and down if it is above.
    A rate of 0, or a model without experts, changes nothing.
    """
    if mixture is None or load is None or not rate:
        return
    missing = 1.0 / mixture.config.num_experts - load.share
    # A share that is even up to rounding must not move: its sign would depend on the number of ranks
    change = torch.where(missing.abs() < 1e-6, 0.0, missing.sign() * rate)
    for layer, step in zip(mixture.config.mixture_layers, change, strict=True):
        mixture.model.layers[layer].mlp.gate.selection_bias += step
