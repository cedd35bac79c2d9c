"""Metrics of a mixture's routers during training: the load of the experts, and how far the routers have moved.

    routing/layer_<l>/load_<expert>     share of all choices
    routing/layer_<l>/entropy           entropy of a token's router probabilities, in nats
    routing/layer_<l>/imbalance         largest share divided by the mean share
    routing/layer_<l>/dropped           share of all choices that exceeded an expert's capacity, if there is a capacity
    routing/layer_<l>/drift             L2 distance of the FFN router from step 0, relative to its norm at step 0
                                        (without the rows of late experts)
    routing/layer_<l>/attention_drift   the same for the attention router, if there is one
    routing/dead_experts, routing/overloaded_experts    numbers of experts, over all layers
    load_imbalance, routing/dropped     the worst layer

The same for the tokens of one domain of the training data:

    routing_by_domain/<domain>/layer_<l>/load_<expert>, .../entropy, .../imbalance      as above
    routing_by_domain/<domain>/layer_<l>/drift      how far the domain's load moved since it was first reported: half
        the L1 distance, which is the share of its choices that went to other experts (late experts had no choices)
    routing_by_domain/<domain>/entropy, .../imbalance, .../drift    the mean, the worst and the worst of all layers

Loads are means over the steps since the last report. A domain without a sequence in these steps has no metrics. The
sums since the last report and the first loads are part of the training state, so that a run that rolls back or resumes
reports what an uninterrupted run reports.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bam_ray.model import BamForCausalLM
from bam_ray.settings import RoutingSettings
from bam_ray.training.objective import ExpertLoad


@dataclass(frozen=True)
class RoutingReport:
    """The router metrics of the steps since the last report."""

    scalars: dict[str, float]
    by_domain_and_layer: dict[str, float]  # separate, because there are many
    imbalance: float  # of the worst layer
    dead: tuple[str, ...]  # for example "layer 3 law"
    overloaded: tuple[str, ...]


class RouterMetrics:
    """The router metrics of `mixture`, which is trained on data of `domains`.

    `initial_weights` has the routers' weights at step 0, by the names of the mixture's parameters.

    Shapes: M layers with experts, D domains, N experts.
    """

    def __init__(
        self,
        mixture: BamForCausalLM,
        settings: RoutingSettings,
        initial_weights: Mapping[str, Tensor],
        domains: Sequence[str],
    ) -> None:
        config = mixture.config
        self._mixture, self._settings = mixture, settings
        self._layers: list[int] = config.mixture_layers
        self._names = config.expert_names or [str(number) for number in range(config.num_experts)]
        self._initial = {name: initial_weights[name].to(weight) for _, name, weight in self._routers()}
        self._domains = domains
        self.load_state_dict({})

    def add(self, load: ExpertLoad) -> None:
        """Add the load of one step."""
        self._steps += 1
        for name, total in self._sums.items():
            total += getattr(load, name)

    def is_due(self, step: int) -> bool:
        """Return True if a report is due after `step`."""
        return step % self._settings.every == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last report and the first loads, as plain JSON."""
        sums = {name: total.tolist() for name, total in self._sums.items()}
        return {"steps": self._steps, "sums": sums, "first": self._first.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; {} is the state before the first step. Experts that are new since then had no load."""
        layers, domains, experts = len(self._layers), len(self._domains), len(self._names)

        def restored(values: Any, *shape: int) -> Tensor:
            total = torch.zeros(shape, dtype=torch.double)  # as exact as JSON
            if values is not None:
                found = torch.tensor(values, dtype=torch.double)
                total[..., : found.shape[-1]] = found
            return total

        sums = state.get("sums", {})
        self._steps: int = state.get("steps", 0)
        self._sums = {  # on the model's device, so that a step does not wait for them
            "choices": restored(sums.get("choices"), layers, domains, experts).to(self._mixture.device),
            "entropy": restored(sums.get("entropy"), layers, domains).to(self._mixture.device),
            "dropped": restored(sums.get("dropped"), layers).to(self._mixture.device),
        }
        self._first = restored(state.get("first"), layers, domains, experts)  # 0 for a domain that was not seen yet

    def report(self) -> RoutingReport:
        """Return the metrics since the last report; at least one step must have been added."""
        mean = ExpertLoad(**{name: total.cpu() / self._steps for name, total in self._sums.items()})
        self._steps = 0
        for total in self._sums.values():
            total.zero_()
        relative = mean.share * mean.share.shape[1]  # [M, N]; 1: an even share
        imbalance = relative.max(1).values
        dead = self._experts_in(relative < self._settings.dead_below)
        overloaded = self._experts_in(relative > self._settings.overloaded_above)
        worst = imbalance.max().item()
        over_layers, by_layer = self._by_domain(mean)
        scalars = {
            **self._by_layer(mean, imbalance),
            **self._drifts(),
            "load_imbalance": worst,
            "routing/dead_experts": float(len(dead)),
            "routing/overloaded_experts": float(len(overloaded)),
            **over_layers,
        }
        return RoutingReport(scalars, by_layer, worst, dead, overloaded)

    def _by_layer(self, mean: ExpertLoad, imbalance: Tensor) -> dict[str, float]:
        """Return the load metrics of every layer over all domains."""
        share, entropy, dropped = mean.share, mean.entropy.sum(1), mean.dropped  # [M, N], [M], [M]
        scalars: dict[str, float] = {}
        for number, layer in enumerate(self._layers):
            prefix = f"routing/layer_{layer}"
            for name, part in zip(self._names, share[number].tolist(), strict=True):
                scalars[f"{prefix}/load_{name}"] = part
            scalars[f"{prefix}/entropy"] = entropy[number].item()
            scalars[f"{prefix}/imbalance"] = imbalance[number].item()
            if self._mixture.config.capacity_factor is not None:
                scalars[f"{prefix}/dropped"] = dropped[number].item()
                scalars["routing/dropped"] = dropped.max().item()
        return scalars

    def _drifts(self) -> dict[str, float]:
        """Return how far every router has moved since step 0."""
        drifts: dict[str, float] = {}
        for curve, name, weight in self._routers():
            initial = self._initial[name]
            drift = weight.detach()[: len(initial)] - initial
            drifts[curve] = (drift.norm() / initial.norm().clamp(min=1e-12)).item()
        return drifts

    def _by_domain(self, mean: ExpertLoad) -> tuple[dict[str, float], dict[str, float]]:
        """Return the curves of every domain that was seen: those over all layers, and those by layer."""
        over_layers: dict[str, float] = {}
        by_layer: dict[str, float] = {}
        for number, domain in enumerate(self._domains):
            choices, first = mean.choices[:, number], self._first[:, number]  # [M, N]
            part = choices.sum(1)  # [M], shares of all tokens: the same in all layers
            if not part.all():
                continue
            share = choices / part.unsqueeze(1)
            if not first.any():
                first.copy_(share)
            found = {
                "entropy": mean.entropy[:, number] / part,
                "imbalance": share.max(1).values * share.shape[1],
                "drift": (share - first).abs().sum(1) / 2,
            }
            loads = {f"load_{name}": share[:, expert] for expert, name in enumerate(self._names)}
            prefix = f"routing_by_domain/{domain}"
            for layer, *values in zip(self._layers, *(each.tolist() for each in (loads | found).values()), strict=True):
                names = (f"{prefix}/layer_{layer}/{name}" for name in loads | found)
                by_layer |= zip(names, values, strict=True)
            over_layers |= {
                f"{prefix}/entropy": found["entropy"].mean().item(),
                f"{prefix}/imbalance": found["imbalance"].max().item(),
                f"{prefix}/drift": found["drift"].max().item(),
            }
        return over_layers, by_layer

    def _routers(self) -> list[tuple[str, str, Tensor]]:
        """Return the drift curve, the parameter name and the weights of every router."""
        found = []
        for layer in self._layers:
            block: Any = self._mixture.model.layers[layer]
            prefix, parameter = f"routing/layer_{layer}", f"model.layers.{layer}"
            found.append((f"{prefix}/drift", f"{parameter}.mlp.gate.weight", block.mlp.gate.weight))
            if hasattr(block.self_attn, "gate"):
                weight = block.self_attn.gate.weight
                found.append((f"{prefix}/attention_drift", f"{parameter}.self_attn.gate.weight", weight))
        return found

    def _experts_in(self, mask: Tensor) -> tuple[str, ...]:
        """Return the names of the experts for which `mask` [M, N] is True."""
        return tuple(f"layer {self._layers[layer]} {self._names[expert]}" for layer, expert in mask.nonzero().tolist())
