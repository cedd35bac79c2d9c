"""Removal of near-duplicates, and the overlap between the held-out part and the training part.

Problem: texts copy one another, licenses above all. A held-out document that is mostly contained in the training part
measures memorization, not modeling.

Design choice: texts are compared by their 13-grams of words, as in the contamination checks of GPT-3 and later models.
Before the split, a document is dropped if more than `MAX_SEEN_FRACTION` of its 13-grams occur in documents kept before
it. The held-out documents are chosen among those that share at most `MAX_SHARED_FRACTION` of their 13-grams with any
other document (see `split`). `leaked_fraction` measures the overlap that remains.

Words are runs of letters, digits and underscores after case folding. An n-gram is stored as a 64-bit hash; among 10
million of them, the probability of any collision is 3 in a million.

Limits: the hashes are based on Python's string hash, which differs from process to process, so hashes must never be
stored or compared between processes.
"""

import re

import numpy as np
from numpy.typing import NDArray

NGRAM_WORDS = 13
MAX_SEEN_FRACTION = 0.2
MAX_SHARED_FRACTION = 0.05

NGramHashes = NDArray[np.uint64]
"""Hashes of n-grams, sorted and distinct."""

_word = re.compile(r"\w+")
_multiplier = np.uint64(0x9E3779B97F4A7C15)


def ngram_hashes(text: str) -> NGramHashes:
    """Return the hashes of all 13-grams of `text`; a text of fewer words is a single n-gram."""
    words = _word.findall(text.casefold())
    hashes = np.fromiter(map(hash, words or [text]), dtype=np.int64).view(np.uint64)
    length = min(NGRAM_WORDS, len(hashes))
    count = len(hashes) - length + 1
    rolled = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        rolled = rolled * _multiplier + hashes[offset : offset + count]
    rolled.sort()  # np.unique builds a hash table first, which takes twice the time
    first = np.ones(count, dtype=bool)
    np.not_equal(rolled[1:], rolled[:-1], out=first[1:])
    return rolled[first]


class NGramSet:
    """A growing set of n-gram hashes that takes 8 bytes per hash.

    The most recent hashes are in a Python set, which is merged into the sorted array when it reaches `merge_at`.
    """

    def __init__(self, merge_at: int = 1 << 20) -> None:
        self._merged: NGramHashes = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()
        self._merge_at = merge_at

    def fraction(self, ngrams: NGramHashes) -> float:
        """Return the fraction of `ngrams` that are in the set."""
        old = _contains(self._merged, ngrams)
        recent = self._recent.intersection(ngrams[~old].tolist())
        return (int(old.sum()) + len(recent)) / len(ngrams)

    def add(self, ngrams: NGramHashes) -> None:
        """Add `ngrams` to the set."""
        self._recent.update(ngrams.tolist())
        if len(self._recent) >= self._merge_at:
            recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._merged = np.union1d(self._merged, recent)
            self._recent.clear()


def shared_fractions(documents: list[NGramHashes]) -> NDArray[np.float64]:
    """Return, for each document, the fraction of its n-grams that also occur in another document."""
    if not documents:
        return np.empty(0)
    hashes, counts = np.unique(np.concatenate(documents), return_counts=True)
    repeated = hashes[counts > 1]
    return np.array([_contains(repeated, ngrams).mean() for ngrams in documents])


def leaked_fraction(held_out: list[NGramHashes], train: list[NGramHashes]) -> float:
    """Return the fraction of the held-out documents' n-grams that also occur in the training documents."""
    ours = np.unique(np.concatenate(held_out))
    found = np.zeros(len(ours), dtype=bool)
    for ngrams in train:  # one document at a time, because the training part is large; the held-out part is searched
        positions = np.searchsorted(ours, ngrams)
        positions[positions == len(ours)] = 0
        found[positions[ours[positions] == ngrams]] = True
    return float(found.mean())


def _contains(sorted_hashes: NGramHashes, ngrams: NGramHashes) -> NDArray[np.bool_]:
    """Return a mask of the `ngrams` that are in `sorted_hashes`."""
    if not len(sorted_hashes):
        return np.zeros(len(ngrams), dtype=bool)
    positions = np.searchsorted(sorted_hashes, ngrams)
    positions[positions == len(sorted_hashes)] = 0
    found: NDArray[np.bool_] = sorted_hashes[positions] == ngrams
    return found
