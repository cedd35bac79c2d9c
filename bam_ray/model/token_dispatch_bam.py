"""The seam between a layer and its FFN experts: `dispatch` brings tokens to the experts, `combine` brings outputs back.

Shapes: T tokens, k experts a token, N experts of the layer, n experts on this rank, d hidden size, R rows: one for each
token and expert that it chose (T·k, unless choices are dropped).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Overlap = Callable[[], None]
"""Work that is done while tokens are in flight."""


class TokenDispatcher(Protocol):
    """The route of tokens to the FFN experts and back."""

    def dispatch(
        self,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        kept: Tensor | None = None,
        overlap: Overlap | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Bring each token to the experts that it chose.

        Args:
            x: The tokens [T, d].
            top_k_index: The experts of each token [T, k].
            top_k_weights: The router weights of these experts [T, k].
            kept: False for choices that are dropped [T, k]; None keeps all of them.
            overlap: Called once, while the tokens are in flight.

        Returns:
            The rows of this rank's experts, sorted by expert, [R, d] in the dtype of the experts' matrix products; the
            number of rows of each of these experts [n]; what `combine` needs to know.
        """
        ...

    def combine(self, rows: Tensor, metadata: Any, x: Tensor) -> Tensor:
        """Bring the outputs of the experts back to the tokens and add them up.

        Args:
            rows: The outputs of this rank's experts for the rows that `dispatch` returned [R, d].
            metadata: What `dispatch` returned with the rows.
            x: The tokens that were dispatched [T, d].

        Returns:
            Σ_k weight · expert(x) in the dtype of `x`: [T, d].
        """
        ...


class LocalDispatchMetadata(NamedTuple):
    """The origin of each row of `LocalTokenDispatcher.dispatch`."""

    token: Tensor  # [R] index of the row's token
    weight: Tensor  # [R] router weight of the token for the row's expert


class LocalTokenDispatcher:
    """The dispatcher of a layer whose FFN experts are all on this rank: rows are only sorted by expert."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        kept: Tensor | None = None,
        overlap: Overlap | None = None,
    ) -> tuple[Tensor, Tensor, LocalDispatchMetadata]:
        """See `TokenDispatcher.dispatch`."""
        expert = top_k_index.reshape(-1)  # [T, k] -> [T·k]
        order = expert.argsort(stable=True)  # [T·k] choices, sorted by expert
        if kept is not None:
            order = order[kept.reshape(-1)[order]]  # [R]
            expert = expert[order]  # [R]
        token = order // top_k_index.shape[1]  # [R]
        counts = (expert.unsqueeze(1) == torch.arange(self.num_experts, device=expert.device)).sum(0)  # [N]
        weight = top_k_weights.reshape(-1).index_select(0, order)  # [R]
        # The cast comes before any communication, so that bf16 rows are sent as bf16.
        rows = to_autocast_dtype(x.index_select(0, token))  # [R, d]
        if overlap is not None:
            overlap()
        return rows, counts, LocalDispatchMetadata(token, weight)

    def combine(self, rows: Tensor, metadata: LocalDispatchMetadata, x: Tensor) -> Tensor:
        """See `TokenDispatcher.combine`."""
        rows = rows.to(x.dtype)
        rows = rows * metadata.weight.unsqueeze(1).to(rows.dtype)  # [R, d] · [R, 1]
        return torch.zeros_like(x).index_add(0, metadata.token, rows)  # [T, d]


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Return x in the dtype of autocast's matrix products, or unchanged if autocast is off."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
