"""Batches from a blend of domains, in an order that depends only on the seed and can be resumed at any position.

Problem: a training run may be interrupted at any step and resumed on another node, with another number of processes
or another batch size per process. The sequence of training examples must not change, and resuming must not replay the
data that was already read.

Design choice: each sequence draws its domain by weight from a counter-based generator (Philox), so draw number i is a
function of (seed, i). The order is therefore the same however it is cut into batches and whichever process reads it.
Within a domain, every epoch visits each row once, in a permutation that is a function of (seed, domain, epoch). The
state of a sampler is its position, the number of sequences drawn per domain, and the current weights.

Limits: a state belongs to a fixed set of domains and a fixed corpus. The weights may change during a run, but the
domains may not.
"""

import zlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bam_ray.data.corpus import Rows
from bam_ray.errors import DataError

BLOCK = 4096  # domain draws per counter value


class TrainingRows(Protocol):
    """Packed training text by domain, such as a `Corpus`."""

    @property
    def sequence_length(self) -> int:
        """The number of tokens of a row."""
        ...

    def train(self, domain: str) -> Rows:
        """Return the training rows of a domain, [sequences, sequence_length]."""
        ...


class BlendedSampler:
    """An endless stream of rows of a corpus, whose domains are drawn by weight.

    Args:
        corpus: The corpus, or other rows by domain.
        blend: The sampling weight of each domain; the weights need not sum to 1, and a domain of weight 0 is left out.
        seed: The seed of all random choices.

    Raises:
        DataError: A weight is negative or not finite, or all weights are 0.
    """

    def __init__(self, corpus: TrainingRows, blend: dict[str, float], seed: int) -> None:
        weights = {domain: blend[domain] for domain in sorted(blend) if blend[domain] != 0}
        if not weights or any(not 0 < weight < float("inf") for weight in weights.values()):
            raise DataError(f"the weights of a blend must be finite, not negative and not all 0: change {blend}")
        self._rows: dict[str, Rows] = {domain: corpus.train(domain) for domain in weights}
        self._length = corpus.sequence_length
        self._apply_weights(weights)
        self._seed = seed
        self._position = 0
        self._drawn = dict.fromkeys(weights, 0)
        self._orders: dict[str, tuple[int, NDArray[np.int64]]] = {}  # domain → epoch and its permutation

    @property
    def drawn(self) -> dict[str, int]:
        """The number of sequences drawn so far, by domain."""
        return dict(self._drawn)

    @property
    def weights(self) -> dict[str, float]:
        """The current probability of each domain; they sum to 1."""
        total = sum(self._weights.values())
        return {domain: weight / total for domain, weight in self._weights.items()}

    def set_weights(self, weights: dict[str, float]) -> None:
        """Draw the following sequences by new weights, which must be positive and of the same domains."""
        assert set(weights) == set(self._weights) and all(weight > 0 for weight in weights.values())
        self._apply_weights({domain: weights[domain] for domain in self._weights})

    def take(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the next sequences and their domains.

        Returns:
            The sequences, int64 [count, sequence_length], and the one-hot encoding of their domains in the order of
            `weights`, int64 [count, domains].
        """
        choices = self._choices(self._position, count)
        batch = np.empty((count, self._length), dtype=np.int64)
        for number, (domain, rows) in enumerate(self._rows.items()):
            positions = np.flatnonzero(choices == number)
            batch[positions] = rows[self._next_rows(domain, len(positions))]
        self._position += count
        return batch, np.eye(len(self._rows), dtype=np.int64)[choices]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"position": self._position, "drawn": dict(self._drawn), "weights": dict(self._weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state; raise `DataError` if it belongs to other domains."""
        drawn = state.get("drawn", {})
        if set(drawn) != set(self._drawn) or sum(drawn.values()) != state.get("position"):
            raise DataError(
                f"the sampler state is for a blend of {sorted(drawn)}, not of {sorted(self._drawn)}: resume with the "
                "recipe that wrote the checkpoint"
            )
        self._position = int(state["position"])
        self._drawn = {domain: int(drawn[domain]) for domain in self._drawn}
        self._apply_weights(state["weights"])

    def _apply_weights(self, weights: dict[str, float]) -> None:
        self._weights = weights  # not normalized, so that the bounds are bit-identical after a resume
        cumulative = np.cumsum(list(weights.values()), dtype=np.float64)
        self._bounds = cumulative[:-1] / cumulative[-1]  # a draw below the first bound selects the first domain

    def _choices(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the domain numbers of draws [start, start + count)."""
        first, last = start // BLOCK, (start + max(count, 1) - 1) // BLOCK
        draws = np.concatenate([self._generator(block).random(BLOCK) for block in range(first, last + 1)])
        offset = start - first * BLOCK
        return np.searchsorted(self._bounds, draws[offset : offset + count], side="right")

    def _next_rows(self, domain: str, count: int) -> NDArray[np.int64]:
        """Return the next `count` row numbers of `domain`, over as many epochs as needed."""
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
        """Return the permutation of an epoch; only the last one of each domain is kept."""
        if self._orders.get(domain, (-1,))[0] != epoch:
            order = self._generator(zlib.crc32(domain.encode()), epoch).permutation(len(self._rows[domain]))
            self._orders[domain] = (epoch, order)
        return self._orders[domain][1]

    def _generator(self, *stream: int) -> np.random.Generator:
        """Return the generator of (seed, stream); one number is a block of domain draws, two are a domain and epoch."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self._seed, spawn_key=stream)))
