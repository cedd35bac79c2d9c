"""The seam between a layer and its attention experts, which may be on other ranks.

An attention is computed in three steps, so that a layer can do other work while tokens are in flight:

    pending = exchange.start(x, gates, attend)  # tokens are sent to the attention experts
    pending.compute()                           # tokens have arrived: attend, and send the outputs back
    out = pending.wait()                        # outputs have arrived

Shapes: B batch, L length, d hidden size, N experts of the layer, n experts on this rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Attend = Callable[[Tensor, Tensor], Tensor]
"""The attention experts of this rank: tokens [B, L, d] and gates [B, L, n] -> weighted sum of outputs [B, L, d]."""


class PendingAttention(ABC):
    """The attention output of one layer in one forward pass, which may still be in flight.

    `compute` and then `wait` must be called, once each, or `result`. Work that runs between the steps overlaps with the
    communication that the step before has started.
    """

    def __init__(self) -> None:
        self._next: str | None = "compute"

    def compute(self) -> None:
        """Wait for the tokens, apply the attention experts of this rank and start to sum their outputs.

        Raises:
            RuntimeError: If it was called before.
        """
        self._advance("compute", "wait")
        self._compute()

    def wait(self) -> Tensor:
        """Wait for the summed outputs and return them: [B, L, d].

        Raises:
            RuntimeError: If `compute` was not called before, or if `wait` was.
        """
        self._advance("wait", None)
        return self._wait()

    def result(self) -> Tensor:
        """Compute, unless that has been done, and wait: [B, L, d]."""
        if self._next == "compute":
            self.compute()
        return self.wait()

    def _advance(self, call: str, following: str | None) -> None:
        if call != self._next:
            raise RuntimeError(
                f"PendingAttention.{call}() was called out of order (next: {self._next or 'nothing'}): "
                "call compute() once, then wait() once"
            )
        self._next = following

    @abstractmethod
    def _compute(self) -> None: ...

    @abstractmethod
    def _wait(self) -> Tensor: ...


class ComputedAttention(PendingAttention):
    """An attention output that is complete already: `compute` and `wait` only check their order."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self._out = out

    def _compute(self) -> None:
        """Do nothing."""

    def _wait(self) -> Tensor:
        return self._out


class AttentionExchange(Protocol):
    """The route of tokens to the attention experts and back."""

    def start(self, x: Tensor, gates: Tensor, attend: Attend) -> PendingAttention:
        """Start to compute Σ_i gate_i · Attention_i(x) over all N experts.

        Args:
            x: The tokens [B, L, d].
            gates: The weight of each expert for each token [B, L, N].
            attend: The attention experts of this rank. Expert parallelism calls it with the tokens of all ranks.
        """
        ...


class LocalAttentionExchange:
    """The exchange of a layer whose attention experts are all on this rank: nothing is sent."""

    def start(self, x: Tensor, gates: Tensor, attend: Attend) -> PendingAttention:
        """See `AttentionExchange.start`. The output is computed at once: there is no communication to overlap with."""
        return ComputedAttention(attend(x, gates))
