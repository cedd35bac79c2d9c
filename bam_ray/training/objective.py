"""What is minimised: next-token NLL, and for mixtures the routers' losses beside it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.model import BamForCausalLM, RoutingLosses, dropped_share, routing_losses
from bam_ray.settings import Losses


@dataclass(frozen=True)
class Load:
    """How the tokens of a batch, of D domains, met the FFN experts of M layers that have any.

    Of each mean over the batch there is what every domain adds to it; a domain's own mean is that over its share.
    """

    choices: Tensor  # [M, D, N], of all choices
    entropy: Tensor  # [M, D], of a token's router probabilities, in nats
    dropped: Tensor  # [M], of all choices, those past an expert's capacity

    @property
    def share(self) -> Tensor:
        """Of all choices, those of each expert: [M, N]."""
        return self.choices.sum(1)


@dataclass
class Objective:
    """NLL plus the weighted auxiliary losses of one micro batch."""

    total: Tensor
    parts: Tensor  # [3], detached: nll, load balance, router z; of mixtures then the `Load`'s, [M, 1 + D·(N + 1)] flat


def objective(
    model: torch.nn.Module,
    input_ids: Tensor,
    losses: Losses,
    mixture: BamForCausalLM | None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    domains: Tensor | None = None,
) -> Objective:
    """The training loss of `input_ids` [B, L]: next-token NLL, and for mixtures the routers' losses.

    `model` is what is called: a `NextTokenLoss`, of `mixture` unless that is None (dense models), or an engine around
    it. `reduce` averages routing statistics over data-parallel ranks (`model.routing_losses`). `domains` [B, D]:
    which sequences are of which domain (`Engine.step`).
    """
    nll, routers = model(input_ids)
    if mixture is None or not mixture.config.mixture_layers:
        zero = torch.zeros((), device=nll.device)
        return Objective(nll, torch.stack((nll.detach(), zero, zero)))
    biases = mixture.selection_biases()
    routing = routing_losses(routers, mixture.config.num_experts_per_tok, reduce, bias=biases)
    load = _load(routing, mixture, all_of_one(input_ids) if domains is None else domains)
    load_balance, router_z = losses.load_balance, losses.router_z
    assert isinstance(load_balance, float) and isinstance(router_z, float), "a ramp: use Losses.at"
    total = nll + load_balance * routing.load_balance + router_z * routing.router_z
    parts = torch.stack((nll, routing.load_balance, routing.router_z)).detach()
    return Objective(total, torch.cat((parts, load.flatten())))


def _load(routing: RoutingLosses, mixture: BamForCausalLM, domains: Tensor) -> Tensor:
    """The `Load` of sequences of `domains` [B, D], in one: [M, 1 + D·(N + 1)]."""
    sequences, config = len(domains), mixture.config
    chosen = F.one_hot(routing.chosen.unflatten(1, (sequences, -1)), config.num_experts)  # [M, B, L, k, N]
    choices = chosen.float().mean((2, 3))
    entropy = routing.entropy.unflatten(1, (sequences, -1)).mean(2, keepdim=True)  # [M, B, 1]
    by_sequence = torch.cat((choices, entropy), dim=-1).unsqueeze(2)  # [M, B, 1, N + 1]
    # No matrix product, which a GPU may round more
    by_domain = (by_sequence * domains.unsqueeze(-1)).mean(1)  # [M, D, N + 1]
    dropped = dropped_share(routing.chosen, config, sequences)
    return torch.cat((dropped.unsqueeze(1), by_domain.flatten(1)), dim=1)


def all_of_one(input_ids: Tensor) -> Tensor:
    """The domains [B, 1] of sequences [B, L] that are of one."""
    return input_ids.new_ones(len(input_ids), 1)


def parts_of(mixture: BamForCausalLM | None, domains: int) -> int:
    """How many numbers `Objective.parts` has."""
    if mixture is None:
        return 3
    numbers: int = 3 + len(mixture.config.mixture_layers) * (1 + domains * (mixture.config.num_experts + 1))
    return numbers


def load_of(parts: Tensor, mixture: BamForCausalLM | None) -> Load | None:
    """The load in (a mean of) `Objective.parts`."""
    if mixture is None or not mixture.config.mixture_layers:
        return None
    by_layer = parts[3:].view(len(mixture.config.mixture_layers), -1)
    by_domain = by_layer[:, 1:].unflatten(1, (-1, mixture.config.num_experts + 1))
    return Load(by_domain[..., :-1], by_domain[..., -1], by_layer[:, 0])


@torch.no_grad()
def held_out_nll(
    model: PreTrainedModel, forward: Callable[[Tensor], Objective], input_ids: Tensor, micro_batch: int | None
) -> float:
    """The mean NLL of `input_ids` [B, L], no noise and no dropout in it; `forward` calls `model`."""
    model.eval()
    try:
        micros = input_ids.split(micro_batch or 1)
        sums = [forward(micro).parts[0] * len(micro) for micro in micros]
    finally:
        model.train()
    return float(torch.stack(sums).sum() / len(input_ids))


def as_mixture(model: PreTrainedModel) -> BamForCausalLM | None:
    """`model` where it is a mixture."""
    return model if isinstance(model, BamForCausalLM) else None


@torch.no_grad()
def balance(mixture: BamForCausalLM | None, load: Load | None, rate: float) -> None:
    """Move every selection bias by `rate`: up where an expert's share of the last batch's choices is too small, down
    where it is too large. Nothing for a rate of 0 or a model without experts."""
    if mixture is None or load is None or not rate:
        return
    lack = 1.0 / mixture.config.num_experts - load.share
    towards = torch.where(lack.abs() < 1e-6, 0.0, lack.sign() * rate)  # what rounding makes of none depends on ranks
    for layer, step in zip(mixture.config.mixture_layers, towards, strict=True):
        mixture.model.layers[layer].mlp.gate.selection_bias += step
