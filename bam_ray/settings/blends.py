"""Blends of the mixing phase: LLaMA-MoE's presets by name, and blends that follow held-out losses."""

from typing import Any

from bam_ray.settings.strict import Blend, Count, Name, NotNegative, Strict


class DynamicBlend(Strict):
    """A blend that shifts to the domains in which the mixture is furthest behind.

    This is Sheared-LLaMA's rule (arXiv 2310.06694), which LLaMA-MoE uses. Each weight is multiplied by exp(max(0, loss
    - reference)) of its domain, and the weights are normalized to sum to 1. The blend starts as `mix.blend`.
    """

    every: Count = 170
    """Number of steps between updates. (LLaMA-MoE: 2.5 billion tokens at 14.7 million per step.)"""
    sequences: Count = 64
    """Number of held-out sequences per domain whose loss is measured."""
    reference: dict[Name, NotNegative] | None = None
    """Reference loss of each domain, in nats per token. `null` means the loss of the domain's branch, or of the seed if
    there is none."""


PILES = ("common-crawl", "c4", "github", "wikipedia", "books", "arxiv", "stackexchange")  # of RedPajama and SlimPajama
LLAMA: Blend = dict(zip(PILES, (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02), strict=True))  # arXiv 2302.13971
SHEARED: Blend = dict(zip(PILES, (0.361, 0.492, 0.008, 0.031, 0.091, 0.007, 0.01), strict=True))  # arXiv 2310.06694
PRESETS: dict[str, tuple[Blend | None, bool]] = {
    "static_llama": (LLAMA, False),
    "static_sheared": (SHEARED, False),
    "dynamic_llama": (LLAMA, True),
    "dynamic_uniform": (None, True),
}
"""LLaMA-MoE's four presets (arXiv 2406.16554): the initial blend, and whether it is dynamic."""


def with_preset(plain: Any) -> Any:
    """Return the plain settings of `mix` with the name of a preset in `blend` replaced by its meaning."""
    if not isinstance(plain, dict) or not isinstance(plain.get("blend"), str):
        return plain
    if plain["blend"] not in PRESETS:
        raise ValueError(f"blend is {plain['blend']!r}: give weights of domains, or one of {', '.join(PRESETS)}")
    blend, dynamic = PRESETS[plain["blend"]]
    given = plain.get("dynamic_blend")
    if given is not None and not dynamic:
        raise ValueError(f"blend {plain['blend']} is static: leave out dynamic_blend, or give weights of domains")
    return {**plain, "blend": blend, "dynamic_blend": (given or {}) if dynamic else None}
