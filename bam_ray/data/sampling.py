"""Batches from a blend of domains, in one order that is fixed by the seed and can be taken up anywhere.

Each sequence draws its domain by weight from a counter-based generator: draw number i is a function of (seed, i), so
the order is the same however it is cut into batches and whoever reads it. Within a domain, rows come in an order that
is shuffled anew every epoch, each row once, by (seed, domain, epoch). What a training job must remember is two numbers
a domain, and the weights where they have changed on the way: nothing is replayed when it resumes.
"""

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bam_ray.data.corpus import Corpus, Rows
from bam_ray.errors import DataError

BLOCK = 4096  # draws of domains that come from one counter value


class BlendedSampler:
    """Rows of `corpus` by the weights of `blend` (they need not sum to 1); raises `DataError` for a bad blend."""

    def __init__(self, corpus: Corpus, blend: dict[str, float], seed: int) -> None:
        weights = {domain: blend[domain] for domain in sorted(blend) if blend[domain] != 0}
        if not weights or any(not 0 < weight < float("inf") for weight in weights.values()):
            raise DataError(f"a blend needs weights of 0 or more, at least one above 0: {blend}")
        self._rows: dict[str, Rows] = {domain: corpus.train(domain) for domain in weights}
        self._length = corpus.sequence_length
        self._weigh(weights)
        self._seed = seed
        self._position = 0
        self._drawn = dict.fromkeys(weights, 0)
        self._orders: dict[str, tuple[int, NDArray[np.int64]]] = {}  # domain → epoch and its order

    @property
    def drawn(self) -> dict[str, int]:
        """Sequences taken so far, by domain."""
        return dict(self._drawn)

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the next sequence's domain; they sum to 1."""
        total = sum(self._weights.values())
        return {domain: weight / total for domain, weight in self._weights.items()}

    def reweigh(self, weights: dict[str, float]) -> None:
        """Draw by other weights from here on, above 0, of the same domains."""
        assert set(weights) == set(self._weights) and all(weight > 0 for weight in weights.values())
        self._weigh({domain: weights[domain] for domain in self._weights})

    def take(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The next `count` sequences, [count, sequence_length], and which domain of `weights` each is of: 1 there in
        [count, domains], else 0."""
        choices = self._choices(self._position, count)
        batch = np.empty((count, self._length), dtype=np.int64)
        for number, (domain, rows) in enumerate(self._rows.items()):
            places = np.flatnonzero(choices == number)
            batch[places] = rows[self._next_rows(domain, len(places))]
        self._position += count
        return batch, np.eye(len(self._rows), dtype=np.int64)[choices]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain JSON values."""
        return {"position": self._position, "drawn": dict(self._drawn), "weights": dict(self._weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; raises `DataError` where that was another blend."""
        drawn = state.get("drawn", {})
        if set(drawn) != set(self._drawn) or sum(drawn.values()) != state.get("position"):
            raise DataError(
                f"this data cursor is of a blend of {sorted(drawn)}, not of {sorted(self._drawn)}: resume with the "
                "recipe that wrote the checkpoint"
            )
        self._position = int(state["position"])
        self._drawn = {domain: int(drawn[domain]) for domain in self._drawn}
        self._weigh(state["weights"])

    def _weigh(self, weights: dict[str, float]) -> None:
        self._weights = weights  # not made to sum to 1: bounds must be the same to the bit when they are read again
        cumulative = np.cumsum(list(weights.values()), dtype=np.float64)
        self._bounds = cumulative[:-1] / cumulative[-1]  # a draw below the first bound is the first domain

    def _choices(self, start: int, count: int) -> NDArray[np.int64]:
        """The domain number of draws [start, start + count)."""
        first, last = start // BLOCK, (start + max(count, 1) - 1) // BLOCK
        draws = np.concatenate([self._generator(block).random(BLOCK) for block in range(first, last + 1)])
        offset = start - first * BLOCK
        return np.searchsorted(self._bounds, draws[offset : offset + count], side="right")

    def _next_rows(self, domain: str, count: int) -> NDArray[np.int64]:
        """The next `count` row numbers of `domain`, over as many epochs as that takes."""
        size = len(self._rows[domain])
        parts = [np.empty(0, dtype=np.int64)]
        while count:
            epoch, offset = divmod(self._drawn[domain], size)
            part = self._order(domain, epoch)[offset : offset + count]
            parts.append(part)
            self._drawn[domain] += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def _order(self, domain: str, epoch: int) -> NDArray[np.int64]:
        if self._orders.get(domain, (-1,))[0] != epoch:
            order = self._generator(zlib.crc32(domain.encode()), epoch).permutation(len(self._rows[domain]))
            self._orders[domain] = (epoch, order)
        return self._orders[domain][1]

    def _generator(self, *stream: int) -> np.random.Generator:
        """A generator of its own for each (seed, stream): one number counts domain draws, two an epoch's order."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self._seed, spawn_key=stream)))
