"""Bootstrap resampling of held-out sequences and of training seeds."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
HIERARCHICAL_RESAMPLES = 2000


def bootstrap_perplexity(sequence_nll: Sequence[float], seed: int = 0) -> np.ndarray:
    """Return the perplexity of each bootstrap resample of the sequences, [RESAMPLES].

    The draws depend only on `seed` and on the number of sequences, so two models that are scored on the same sequences
    are resampled with the same draws.
    """
    values = np.asarray(sequence_nll)
    indices = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    return np.asarray(np.exp(values[indices].mean(axis=1)))


def bootstrap_means(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the mean of each bootstrap resample of documents of different lengths, [RESAMPLES, k].

    The columns share the draws, so their differences are paired.

    Args:
        sums: The sum over the tokens of each document, [n, k].
        counts: The number of tokens of each document, [n].
        seed: The random seed of the draws.
    """
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(counts), size=len(counts)) for _ in range(RESAMPLES))
    return np.stack([sums[drawn].sum(axis=0) / counts[drawn].sum() for drawn in draws])


class Resamples:
    """The draws of a hierarchical bootstrap: training seeds, then the held-out sequences of each domain.

    All models share the draws, so a difference between two models is paired. All training seeds are scored on the same
    sequences, so the sequences are drawn once for all training seeds of a resample.

    Args:
        training_seeds: K, the number of training seeds.
        sequences: The number of sequences S of each domain.
        count: B, the number of resamples.
        seed: The random seed of the draws.
    """

    def __init__(
        self, training_seeds: int, sequences: Sequence[int], count: int = HIERARCHICAL_RESAMPLES, seed: int = 0
    ) -> None:
        self.count = count
        rng = np.random.default_rng(seed)

        def weights(values: int) -> np.ndarray:
            """Return how often each value is drawn, as a share of all draws, [B, values]."""
            return np.asarray(rng.multinomial(values, [1 / values] * values, size=count) / values)

        self._seeds = weights(training_seeds)
        self._sequences = [weights(number) for number in sequences]

    def text_means(self, domain: int, sequence_nll: np.ndarray) -> np.ndarray:
        """Return the mean over the drawn sequences of each resample, [B, K], for the NLLs of a domain, [K, S]."""
        return np.asarray(self._sequences[domain] @ sequence_nll.T)

    def seed_means(self, values: np.ndarray) -> np.ndarray:
        """Return the mean over the drawn training seeds of each resample, [B], for `values` [B, K]."""
        return np.asarray((self._seeds * values).sum(axis=1))


def interval_95(samples: np.ndarray) -> tuple[float, float]:
    """Return the 2.5th and the 97.5th percentile of `samples`."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)
