"""The seam between the tables of embedding experts, which may be on other ranks, and the rest of a mixture.

Shapes: E ranks among which the tables are divided, B batch, L length, T tokens of this rank, d hidden size, N tables,
n = N / E tables of this rank, V vocabulary size, V' size of this rank's slice of the vocabulary.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

LookUp = Callable[[Tensor], Tensor]
"""The tables of this rank: token ids [B, L] -> their rows [B, L, n, d]."""


class TableExchange(Protocol):
    """The route of tokens to the tables of the input and of the output head, and back.

    The input needs the rows of all tables. The head needs the logits of all tokens in a slice of the vocabulary, which
    all tables of that slice give:

        tables = exchange.slice_vocabulary(weight)                        # [n, V, d] -> [N, V', d]
        x, gates = exchange.gather(x), exchange.gather(gates)             # [T, ...] -> [E·T, ...]
        logits = exchange.join_vocabulary(Σ_i gates_i · x · tables_iᵀ)    # [E·T, V'] -> [T, V]

    The loss needs no whole logits: `log_softmax` normalizes those of a slice over the whole vocabulary.

    Attributes:
        size: E.
        first_token: The first token id of this rank's slice of the vocabulary.
    """

    @property
    def size(self) -> int: ...  # noqa: D102 (see the class)

    @property
    def first_token(self) -> int: ...  # noqa: D102 (see the class)

    def rows(self, input_ids: Tensor, look_up: LookUp) -> Tensor:
        """Return the rows of all tables: ids [B, L] -> [B, L, N, d]."""
        ...

    def slice_vocabulary(self, tables: Tensor) -> Tensor:
        """Return this rank's slice of all tables: [n, V, d] -> [N, V', d]."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Return the values of the tokens of all ranks: [T, ...] -> [E·T, ...]."""
        ...

    def sum(self, parts: Tensor) -> Tensor:
        """Return the sum over all ranks of values of this rank's tokens: [E·T, ...] -> [T, ...]."""
        ...

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities of this rank's slice of the vocabulary, without gradients: [E·T, V'].

        `logits` [E·T, V'] may be overwritten.
        """
        ...

    def join_vocabulary(self, logits: Tensor) -> Tensor:
        """Return the logits of this rank's tokens in the whole vocabulary: [E·T, V'] -> [T, V]."""
        ...


class LocalTableExchange:
    """The exchange of a model whose tables are all on this rank: nothing is sent."""

    size = 1
    first_token = 0

    def rows(self, input_ids: Tensor, look_up: LookUp) -> Tensor:
        """See `TableExchange.rows`."""
        return look_up(input_ids)

    def slice_vocabulary(self, tables: Tensor) -> Tensor:
        """Return `tables`."""
        return tables

    def gather(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def sum(self, parts: Tensor) -> Tensor:
        """Return `parts`."""
        return parts

    def log_softmax(self, logits: Tensor) -> Tensor:
        """See `TableExchange.log_softmax`."""
        return logits.log_softmax(-1)

    def join_vocabulary(self, logits: Tensor) -> Tensor:
        """Return `logits`."""
        return logits
