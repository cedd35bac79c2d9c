"""Quantities of several training seeds with their bootstrap resamples, and the intervals and verdicts that follow.

Shapes: K training seeds, B resamples, S held-out sequences of a domain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import FiniteFloat

from bam_ray.evaluation.bootstrap import Resamples, interval_95
from bam_ray.evaluation.results import MEAN, ModelScore
from bam_ray.settings import Strict

Verdict = Literal["ahead", "behind", "no difference shown"]


class IntervalEstimate(Strict):
    """An estimate, such as a mean over training seeds, with its 95 % interval."""

    value: FiniteFloat
    interval: tuple[FiniteFloat, FiniteFloat]


@dataclass(frozen=True)
class SeedSamples:
    """A quantity of each training seed."""

    measured: np.ndarray  # [K]
    drawn: np.ndarray  # [B, K], in each resample of the held-out text

    def __sub__(self, other: "SeedSamples") -> "SeedSamples":
        return SeedSamples(self.measured - other.measured, self.drawn - other.drawn)

    def interpolated(self, other: "SeedSamples", part: float) -> "SeedSamples":
        """Return the values that lie at `part` of the way to those of `other`: 0 gives these, 1 gives the others."""
        measured = (1 - part) * self.measured + part * other.measured
        return SeedSamples(measured, (1 - part) * self.drawn + part * other.drawn)


class Samples:
    """The scores of all models, and their bootstrap resamples.

    Args:
        scores: The scores of the K training seeds, by label.
        resamples: The draws, which are the same for all models.
    """

    def __init__(self, scores: Mapping[str, Sequence[ModelScore]], resamples: Resamples) -> None:
        self.resamples = resamples
        self._domains = tuple(next(iter(scores.values()))[0].domains)
        self._nll = {  # by label and domain
            label: {
                domain: self.of_sequences(domain, np.array([model.domains[domain].sequence_nll for model in models]))
                for domain in self._domains
            }
            for label, models in scores.items()
        }

    def of_sequences(self, domain: str, sequence_nll: np.ndarray) -> SeedSamples:
        """Return the mean over the held-out sequences of a domain of values [K, S]."""
        drawn = self.resamples.text_means(self._domains.index(domain), sequence_nll)
        return SeedSamples(sequence_nll.mean(axis=1), drawn)

    def nll(self, label: str, domain: str = MEAN) -> SeedSamples:
        """Return the NLL of a model on a domain, or its mean over the domains, in nats per token."""
        if domain != MEAN:
            return self._nll[label][domain]
        domains = self._nll[label].values()
        return SeedSamples(
            np.mean([each.measured for each in domains], axis=0), np.mean([each.drawn for each in domains], axis=0)
        )

    def perplexity(self, label: str, column: str) -> IntervalEstimate:
        """Return the mean perplexity over training seeds; that of the mean is arithmetic over domains."""
        domains = self._domains if column == MEAN else (column,)
        nll = [self._nll[label][domain] for domain in domains]
        measured = np.mean([np.exp(each.measured) for each in nll], axis=0)
        return self.estimate(SeedSamples(measured, np.mean([np.exp(each.drawn) for each in nll], axis=0)))

    def estimate(self, values: SeedSamples) -> IntervalEstimate:
        """Return the mean over the training seeds with its interval."""
        return IntervalEstimate(value=float(values.measured.mean()), interval=interval_95(self.seed_means(values)))

    def difference(self, values: SeedSamples) -> dict[str, Any]:
        """Return the fields that describe a paired difference in NLL, which is negative if the model is better."""
        nll, by_seed = self.estimate(values), values.measured.tolist()
        return {
            "nll": nll,
            "percent": as_percent(nll),
            "by_seed": tuple(by_seed),
            "verdict": verdict(nll.interval, by_seed),
        }

    def seed_means(self, values: SeedSamples) -> np.ndarray:
        """Return the mean over the drawn training seeds in each resample, [B]."""
        return self.resamples.seed_means(values.drawn)


def verdict(interval: tuple[float, float], by_seed: Sequence[float]) -> Verdict:
    """Return the verdict on differences that are negative if the model is better.

    A model is ahead or behind only if the 95 % interval excludes zero and the difference has the same sign in all
    training seeds.
    """
    low, high = interval
    if high < 0 and all(each < 0 for each in by_seed):
        return "ahead"
    if low > 0 and all(each > 0 for each in by_seed):
        return "behind"
    return "no difference shown"


def as_percent(nll: IntervalEstimate) -> IntervalEstimate:
    """Return a difference in NLL as a change of perplexity in percent."""
    low, high = (100.0 * math.expm1(each) for each in nll.interval)
    return IntervalEstimate(value=100.0 * math.expm1(nll.value), interval=(low, high))
