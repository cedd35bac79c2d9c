"""What a mixture's routers do while they are trained: which experts have work, and how far the routers have moved.

    routing/layer_<l>/load_<expert>     share of all choices
    routing/layer_<l>/entropy           of a token's probabilities, in nats
    routing/layer_<l>/imbalance         largest share over the mean share
    routing/layer_<l>/dropped           share of all choices that were past an expert's capacity, where there is one
    routing/layer_<l>/drift             of the FFN router, relative to step 0 in L2 norm (experts that came later: not)
    routing/layer_<l>/attention_drift   of the attention router, where there is one
    routing/dead_experts, routing/overloaded_experts, load_imbalance, routing/dropped: of all layers, the last two the
        worst of them

Loads are means over the steps since they were last reported.
"""

from collections.abc import Mapping
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
    imbalance: float  # of the worst layer
    dead: tuple[str, ...]  # "layer 3 law"
    overloaded: tuple[str, ...]


class RoutingWatch:
    """Watches `mixture`; `began` has the routers' weights at step 0, by the names that its parameters have."""

    def __init__(self, mixture: BamForCausalLM, settings: RoutingSettings, began: Mapping[str, Tensor]) -> None:
        config = mixture.config
        self._mixture, self._settings = mixture, settings
        self._layers: list[int] = config.mixture_layers
        self._names = config.expert_names or [str(number) for number in range(config.num_experts)]
        self._began = {name: began[name].to(weight) for _, name, weight in self._routers()}
        self._seen: list[Load] = []

    def add(self, load: Load) -> None:
        """A step is done."""
        self._seen.append(load)

    def report(self) -> RoutingReport:
        """What was seen since the last report; there must be something."""
        share = torch.stack([load.share for load in self._seen]).mean(0).cpu()  # [M, N]
        entropy = torch.stack([load.entropy for load in self._seen]).mean(0).cpu()  # [M]
        dropped = torch.stack([load.dropped for load in self._seen]).mean(0).cpu()  # [M]
        self._seen.clear()
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
        return RoutingReport(scalars, worst, dead, overloaded)

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
