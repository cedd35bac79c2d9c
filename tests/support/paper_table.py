"""Model scores with the perplexities of the table in the Branch-Attend-Mix paper."""

import math
from typing import Literal

import numpy as np

from bam_ray.evaluation.results import DomainRouting, DomainScore, ModelScore, Routing
from bam_ray.evaluation.routing import layer_routing

DOMAINS = ("general", "code", "law", "math")
PAPER: dict[str, tuple[float, ...]] = {  # arXiv 2408.08274, 590M, same data
    "seed": (23.98, 8.62, 8.92, 14.12),
    "code": (39.50, 3.71, 10.83, 8.77),
    "law": (87.82, 23.45, 7.53, 30.79),
    "math": (57.61, 6.78, 10.43, 5.67),
    "btx": (26.72, 3.78, 6.63, 5.77),
    "bam": (24.02, 3.45, 6.04, 5.31),
    "shared": (25.38, 3.62, 6.34, 5.94),
}
ATTENTION: dict[str, Literal["kv_experts", "kv_shared", "averaged"]] = {
    "btx": "averaged",
    "bam": "kv_experts",
    "shared": "kv_shared",
}


def domain_score(perplexity: float, domain: str, spread: float = 0.2) -> DomainScore:
    """Return the score of 40 sequences whose relative difficulty is the same for every model."""
    hard = np.random.default_rng(DOMAINS.index(domain)).normal(0.0, spread, 40)
    return DomainScore.of((math.log(perplexity) + hard - hard.mean()).tolist(), 40 * 16)


def model_score(name: str, perplexities: tuple[float, ...]) -> ModelScore:
    """Return the score of the model called `name` in `PAPER`, with the given perplexity of each domain."""
    attention = ATTENTION.get(name)
    layer = layer_routing([0.5, 0.25, 0.25, 0.0], [0.4, 0.3, 0.2, 0.1], 1.28, [], None)
    domain = DomainRouting(tokens=640, layers=(layer,))
    routing = Routing(
        expert_names=("seed", "code", "law", "math"), domains=dict.fromkeys(DOMAINS, domain), overall=domain
    )
    if attention not in (None, "averaged"):
        layer = layer.model_copy(update={"attention_gate": (0.25,) * 4, "attention_entropy": 1.386})
        domain = DomainRouting(tokens=640, layers=(layer,))
        routing = routing.model_copy(update={"domains": dict.fromkeys(DOMAINS, domain), "overall": domain})
    return ModelScore(
        id=f"{name}-0123456789ab",
        name=name,
        kind="seeds" if name == "seed" else "branches" if name in DOMAINS else "mixtures",
        attention_experts=attention,
        experts=4 if attention else 1,
        parameters=700_500_000 if attention else 587_200_000,
        active_parameters=587_200_000,
        domains={domain: domain_score(p, domain) for domain, p in zip(DOMAINS, perplexities, strict=True)},
        routing=routing if attention else None,
    )
