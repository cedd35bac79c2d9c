"""What a mixture's routers do while they are trained: which experts have work, and how far the routers have moved.

    routing/layer_<l>/load_<expert>     share of all choices
    routing/layer_<l>/entropy           of a token's probabilities, in nats
    routing/layer_<l>/imbalance         largest share over the mean share
    routing/layer_<l>/dropped           share of all choices that were past an expert's capacity, where there is one
    routing/layer_<l>/drift             of the FFN router, relative to step 0 in L2 norm (experts that came later: not)
    routing/layer_<l>/attention_drift   of the attention router, where there is one
    routing/dead_experts, routing/overloaded_experts, load_imbalance, routing/dropped: of all layers, the last two the
        worst of them

And what they do with the tokens of one domain of the training data:

    routing_by_domain/<domain>/layer_<l>/load_<expert>, .../entropy, .../imbalance      as above
    routing_by_domain/<domain>/layer_<l>/drift      of the domain's load, from what it was when first reported: half the
        L1 distance, the share of its choices that went elsewhere (experts that came later had none)
    routing_by_domain/<domain>/entropy, .../imbalance, .../drift: of all layers, the mean and twice the worst of them

Loads are means over the steps since they were last reported; a domain of which these had no sequence has none. Part of
the training state is what was added since then, and the first loads: a run that goes back shows what it would have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bam_ray.model import BamForCausalLM
from bam_ray.settings import RoutingSettings
from bam_ray.training.objective import Load


@dataclass(frozen=True)
class RoutingReport:
    """What was seen over some steps."""

    scalars: dict[str, float]
    by_domain_and_layer: dict[str, float]  # apart, as they are many
    imbalance: float  # of the worst layer
    dead: tuple[str, ...]  # "layer 3 law"
    overloaded: tuple[str, ...]


class RoutingWatch:
    """Watches `mixture`, on data of `domains`; `began` has the routers' weights at step 0, by the names that its
    parameters have.

    Shapes: M layers that have experts, D domains, N experts.
    """

    def __init__(
        self,
        mixture: BamForCausalLM,
        settings: RoutingSettings,
        began: Mapping[str, Tensor],
        domains: Sequence[str],
    ) -> None:
        config = mixture.config
        self._mixture, self._settings = mixture, settings
        self._layers: list[int] = config.mixture_layers
        self._names = config.expert_names or [str(number) for number in range(config.num_experts)]
        self._began = {name: began[name].to(weight) for _, name, weight in self._routers()}
        self._domains = domains
        self.load_state_dict({})

    def add(self, load: Load) -> None:
        """A step is done."""
        self._steps += 1
        for name, total in self._sums.items():
            total += getattr(load, name)

    def state_dict(self) -> dict[str, Any]:
        """What was added since the last report, and the first loads, as plain JSON."""
        sums = {name: total.tolist() for name, total in self._sums.items()}
        return {"steps": self._steps, "sums": sums, "first": self._first.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, or with nothing seen from {}. Experts that came since had no load."""
        layers, domains, experts = len(self._layers), len(self._domains), len(self._names)

        def taken_up(values: Any, *shape: int) -> Tensor:
            total = torch.zeros(shape, dtype=torch.double)  # as exact as JSON is
            if values is not None:
                found = torch.tensor(values, dtype=torch.double)
                total[..., : found.shape[-1]] = found
            return total

        sums = state.get("sums", {})
        self._steps: int = state.get("steps", 0)
        self._sums = {  # of `Load`s, where these are: a step does not wait for them
            "choices": taken_up(sums.get("choices"), layers, domains, experts).to(self._mixture.device),
            "entropy": taken_up(sums.get("entropy"), layers, domains).to(self._mixture.device),
            "dropped": taken_up(sums.get("dropped"), layers).to(self._mixture.device),
        }
        self._first = taken_up(state.get("first"), layers, domains, experts)  # loads; 0: of a domain not seen yet

    def report(self) -> RoutingReport:
        """What was seen since the last report; there must be something."""
        mean = Load(**{name: total.cpu() / self._steps for name, total in self._sums.items()})
        self._steps = 0
        for total in self._sums.values():
            total.zero_()
        share, entropy, dropped = mean.share, mean.entropy.sum(1), mean.dropped  # [M, N], [M], [M]
        relative = share * share.shape[1]  # 1: an even share
        imbalance = relative.max(1).values
        scalars: dict[str, float] = {}
        for number, layer in enumerate(self._layers):
            below = f"routing/layer_{layer}"
            for name, part in zip(self._names, share[number].tolist(), strict=True):
                scalars[f"{below}/load_{name}"] = part
            scalars[f"{below}/entropy"] = entropy[number].item()
            scalars[f"{below}/imbalance"] = imbalance[number].item()
            if self._mixture.config.capacity_factor is not None:
                scalars[f"{below}/dropped"] = dropped[number].item()
                scalars["routing/dropped"] = dropped.max().item()
        for path, name, weight in self._routers():
            began = self._began[name]
            drift = weight.detach()[: len(began)] - began
            scalars[path] = (drift.norm() / began.norm().clamp(min=1e-12)).item()
        dead = self._where(relative < self._settings.dead_below)
        overloaded = self._where(relative > self._settings.overloaded_above)
        worst = imbalance.max().item()
        scalars |= {
            "load_imbalance": worst,
            "routing/dead_experts": float(len(dead)),
            "routing/overloaded_experts": float(len(overloaded)),
        }
        over_layers, by_layer = self._by_domain(mean)
        return RoutingReport(scalars | over_layers, by_layer, worst, dead, overloaded)

    def _by_domain(self, mean: Load) -> tuple[dict[str, float], dict[str, float]]:
        """The curves of every domain that was seen: those over all layers, and those by layer."""
        over_layers: dict[str, float] = {}
        by_layer: dict[str, float] = {}
        for number, domain in enumerate(self._domains):
            choices, first = mean.choices[:, number], self._first[:, number]  # [M, N]
            part = choices.sum(1)  # [M], of all tokens: the same in all layers
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
            below = f"routing_by_domain/{domain}"
            for layer, *values in zip(self._layers, *(each.tolist() for each in (loads | found).values()), strict=True):
                names = (f"{below}/layer_{layer}/{name}" for name in loads | found)
                by_layer |= zip(names, values, strict=True)
            over_layers |= {
                f"{below}/entropy": found["entropy"].mean().item(),
                f"{below}/imbalance": found["imbalance"].max().item(),
                f"{below}/drift": found["drift"].max().item(),
            }
        return over_layers, by_layer

    def _routers(self) -> list[tuple[str, str, Tensor]]:
        """Every router's weights, with the name that its drift has and its own."""
        found = []
        for layer in self._layers:
            block: Any = self._mixture.model.layers[layer]
            below, own = f"routing/layer_{layer}", f"model.layers.{layer}"
            found.append((f"{below}/drift", f"{own}.mlp.gate.weight", block.mlp.gate.weight))
            if hasattr(block.self_attn, "gate"):
                weight = block.self_attn.gate.weight
                found.append((f"{below}/attention_drift", f"{own}.self_attn.gate.weight", weight))
        return found

    def _where(self, mask: Tensor) -> tuple[str, ...]:
        """The experts [M, N] that are so, in words."""
        return tuple(f"layer {self._layers[layer]} {self._names[expert]}" for layer, expert in mask.nonzero().tolist())
