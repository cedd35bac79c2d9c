"""A blend of domains that depends on held-out losses while a mixture is trained (`settings.DynamicBlend`).

w_i ← w_i · exp(max(0, ℓ_i − ℓ_ref,i)) / Σ_j w_j · exp(max(0, ℓ_j − ℓ_ref,j))
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bam_ray.data import BlendedSampler, Corpus
from bam_ray.errors import SettingsError
from bam_ray.settings import DynamicBlend
from bam_ray.training.engine import Engine
from bam_ray.training.events import BlendUpdated


class DynamicBlendSampler:
    """A `loop.AdaptiveSampler`: a blended sampler whose weights are updated at regular steps."""

    def __init__(
        self,
        sampler: BlendedSampler,
        settings: DynamicBlend,
        reference: Callable[[str, np.ndarray], float],
        rows: dict[str, np.ndarray],
    ) -> None:
        """Wrap a sampler.

        Args:
            sampler: The sampler with the initial weights.
            settings: When the weights are updated, and the reference losses if they are given.
            reference: Returns a domain's mean reference NLL on rows [S, L], in nats per token. It is called once per
                domain in a run, because its results are part of the state.
            rows: This rank's held-out rows, int64 [S, L], of each domain; every rank has equally many
                (`held_out_rows`).
        """
        self._sampler, self._settings, self._rows = sampler, settings, rows
        self._reference_of = reference
        self._reference = settings.reference

    @property
    def weights(self) -> dict[str, float]:
        """The current weights, by domain."""
        return self._sampler.weights

    @property
    def drawn(self) -> dict[str, int]:
        """The number of sequences that were drawn, by domain."""
        return self._sampler.drawn

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `loop.Sampler`."""
        return self._sampler.take(count)

    def state_dict(self) -> dict[str, Any]:
        """See `loop.Sampler`."""
        return {**self._sampler.state_dict(), "reference": self._reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `loop.Sampler`."""
        self._sampler.load_state_dict(state)
        self._reference = state["reference"]

    def adapt(self, step: int, engine: Engine) -> BlendUpdated | None:
        """Update the weights if an update is due after `step`; see `loop.AdaptiveSampler`."""
        if step % self._settings.every:
            return None
        if self._reference is None:
            self._reference = {
                domain: engine.mean(self._reference_of(domain, rows)) for domain, rows in self._rows.items()
            }
        losses = {domain: engine.evaluate(torch.from_numpy(rows)) for domain, rows in self._rows.items()}
        excess = {domain: max(0.0, losses[domain] - self._reference[domain]) for domain in losses}
        weights = {domain: weight * math.exp(excess[domain]) for domain, weight in self._sampler.weights.items()}
        self._sampler.set_weights(weights)
        return BlendUpdated(step, self._sampler.weights, losses, self._reference)


def held_out_rows(corpus: Corpus, domain: str, sequences: int, rank: int, world_size: int) -> np.ndarray:
    """Return a rank's share of up to `sequences` held-out rows of a domain, spread over its text: int64 [S, L].

    Raises `SettingsError` if there are fewer rows than ranks.
    """
    found = corpus.held_out(domain)
    count = min(len(found), sequences) // world_size * world_size
    if not count:
        raise SettingsError(
            f"mix.dynamic_blend has only {min(len(found), sequences)} held-out sequences of {domain}, fewer than the "
            f"{world_size} processes: raise mix.dynamic_blend.sequences or data.held_out_fraction"
        )
    spread = found[np.arange(count) * len(found) // count]
    return spread[rank::world_size].astype(np.int64)
