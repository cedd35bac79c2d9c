"""A blend of domains that follows held-out losses while a mixture is trained (`settings.DynamicBlend`).

w_i ← w_i · exp(max(0, ℓ_i − ℓ_ref,i)) / Σ_j w_j · exp(max(0, ℓ_j − ℓ_ref,j))
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from bam_ray.data import BlendedSampler
from bam_ray.settings import DynamicBlend
from bam_ray.training.checkpoints import Tell
from bam_ray.training.engine import Engine


class FollowingSampler:
    """A `loop.Sampler` over `sampler`, whose weights move every so many steps.

    `held_out` are this rank's rows [B, L] of each domain, as many on every rank. `reference` gives this rank's mean
    reference loss on them; it is asked once in a run, for what it gave is part of the state.
    """

    def __init__(
        self,
        sampler: BlendedSampler,
        settings: DynamicBlend,
        held_out: Mapping[str, Tensor],
        reference: Callable[[str], float],
        engine: Engine,
        tell: Tell,
    ) -> None:
        self._sampler, self._settings, self._held_out = sampler, settings, held_out
        self._ask, self._engine, self._tell = reference, engine, tell
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

    def follow(self, step: int) -> None:
        """Move the weights, if it is time to; on all ranks, after `step`."""
        if step % self._settings.every:
            return
        if self._reference is None:
            self._reference = {domain: self._engine.mean(self._ask(domain)) for domain in self._held_out}
        losses = {domain: self._engine.evaluate(rows) for domain, rows in self._held_out.items()}
        behind = {domain: max(0.0, losses[domain] - self._reference[domain]) for domain in losses}
        weights = {domain: weight * math.exp(behind[domain]) for domain, weight in self._sampler.weights.items()}
        self._sampler.set_weights(weights)
        self._tell("blend", step=step, weights=self._sampler.weights, held_out=losses, reference=self._reference)
