"""Near-duplicates out, and what the held-out part shares with the training part.

Texts copy one another (licences do above all), and a held-out document that is mostly in the training part measures
memory, not modelling. So before the split a document is dropped when more than `MOST_SEEN` of its 13-word sequences
stand in documents kept before it, and documents for the held-out part are chosen among those that share at most
`MOST_SHARED` of theirs with any other (see `split`). What still is shared is counted by `leak`.

Words are compared by case-folded letters and digits alone. A sequence is a 64-bit hash: with 10 million of them the
odds that any two collide are 3 in a million. They rest on Python's own string hash, which differs from process to
process but only ever meets itself here.
"""

import re

import numpy as np
from numpy.typing import NDArray

WORDS = 13  # GPT-3's and later contamination checks
MOST_SEEN = 0.2
MOST_SHARED = 0.05

Sequences = NDArray[np.uint64]  # sorted, each once

_word = re.compile(r"\w+")
_multiplier = np.uint64(0x9E3779B97F4A7C15)


def word_sequences(text: str) -> Sequences:
    """Hashes of all sequences of 13 words of `text`; of all its words where they are fewer."""
    words = _word.findall(text.casefold())
    hashes = np.fromiter(map(hash, words or [text]), dtype=np.int64).view(np.uint64)
    length = min(WORDS, len(hashes))
    count = len(hashes) - length + 1
    rolled = np.zeros(count, dtype=np.uint64)
    for place in range(length):
        rolled = rolled * _multiplier + hashes[place : place + count]
    rolled.sort()  # np.unique hashes first, at twice the time
    first = np.ones(count, dtype=bool)
    np.not_equal(rolled[1:], rolled[:-1], out=first[1:])
    return rolled[first]


class Seen:
    """A growing set of sequences: 8 bytes each, but for the newest, which wait in a Python set to be merged."""

    def __init__(self, merge_at: int = 1 << 20) -> None:
        self._merged: Sequences = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()
        self._merge_at = merge_at

    def fraction(self, sequences: Sequences) -> float:
        """The part of `sequences` that is in the set."""
        old = _contains(self._merged, sequences)
        recent = self._recent.intersection(sequences[~old].tolist())
        return (int(old.sum()) + len(recent)) / len(sequences)

    def add(self, sequences: Sequences) -> None:
        """Put `sequences` in."""
        self._recent.update(sequences.tolist())
        if len(self._recent) >= self._merge_at:
            recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._merged = np.union1d(self._merged, recent)
            self._recent.clear()


def shared_fractions(documents: list[Sequences]) -> NDArray[np.float64]:
    """For each document the part of its sequences that another document has too."""
    if not documents:
        return np.empty(0)
    numbers, counts = np.unique(np.concatenate(documents), return_counts=True)
    several = numbers[counts > 1]
    return np.array([_contains(several, sequences).mean() for sequences in documents])


def leak(held_out: list[Sequences], train: list[Sequences]) -> float:
    """The part of the held-out documents' sequences that the training documents have too."""
    ours = np.unique(np.concatenate(held_out))
    found = np.zeros(len(ours), dtype=bool)
    for sequences in train:  # document by document: the held-out part is the small one, and searched
        places = np.searchsorted(ours, sequences)
        places[places == len(ours)] = 0
        found[places[ours[places] == sequences]] = True
    return float(found.mean())


def _contains(among: Sequences, sequences: Sequences) -> NDArray[np.bool_]:
    """Which of `sequences` are in the sorted `among`."""
    if not len(among):
        return np.zeros(len(sequences), dtype=bool)
    places = np.searchsorted(among, sequences)
    places[places == len(among)] = 0
    found: NDArray[np.bool_] = among[places] == sequences
    return found
