"""Bootstrap resampling of held-out sequences."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000


def bootstrap_perplexity(sequence_nll: Sequence[float], seed: int = 0) -> np.ndarray:
    """Return the perplexity of each bootstrap resample of the sequences, [RESAMPLES].

    The draws depend only on `seed` and on the number of sequences, so two models that are scored on the same sequences
    are resampled with the same draws.
    """
    values = np.asarray(sequence_nll)
    indices = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    return np.asarray(np.exp(values[indices].mean(axis=1)))


def interval_95(samples: np.ndarray) -> tuple[float, float]:
    """Return the 2.5th and the 97.5th percentile of `samples`."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)
