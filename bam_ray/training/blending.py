"""A blend of domains that depends on held-out losses while a mixture is trained (`settings.DynamicBlend`).

w_i ← w_i · exp(max(0, ℓ_i − ℓ_ref,i)) / Σ_j w_j · exp(max(0, ℓ_j − ℓ_ref,j))
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from bam_ray.data import BlendedSampler
from bam_ray.settings import DynamicBlend
from bam_ray.training.engine import Engine
from bam_ray.training.events import BlendUpdated, Emit


class DynamicBlendSampler:
    """A `loop.AdaptiveSampler`: the sampler `sampler`, whose weights are updated at regular steps."""

    def __init__(
        self,
        sampler: BlendedSampler,
        settings: DynamicBlend,
        held_out: Mapping[str, Tensor],
        reference: Callable[[str], float],
        engine: Engine,
        emit: Emit,
    ) -> None:
        """Wrap a sampler.

        Args:
            sampler: The sampler with the initial weights.
            settings: When the weights are updated, and the reference losses if they are given.
            held_out: This rank's rows [B, L] of each domain; every rank has equally many.
            reference: Returns this rank's mean reference loss on the rows of a domain. It is called once in a run,
                because its results are part of the state.
            engine: Computes the held-out losses.
            emit: Receives `BlendUpdated`.
        """
        self._sampler, self._settings, self._held_out = sampler, settings, held_out
        self._reference_of, self._engine, self._emit = reference, engine, emit
        self._reference = settings.reference

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

    def adapt(self, step: int) -> None:
        """Update the weights if an update is due after `step`. All ranks call this."""
        if step % self._settings.every:
            return
        if self._reference is None:
            self._reference = {domain: self._engine.mean(self._reference_of(domain)) for domain in self._held_out}
        losses = {domain: self._engine.evaluate(rows) for domain, rows in self._held_out.items()}
        excess = {domain: max(0.0, losses[domain] - self._reference[domain]) for domain in losses}
        weights = {domain: weight * math.exp(excess[domain]) for domain, weight in self._sampler.weights.items()}
        self._sampler.reweigh(weights)
        self._emit(BlendUpdated(step, self._sampler.weights, losses, self._reference))
