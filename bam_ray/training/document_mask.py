"""Documents that lie in one sequence, kept apart: none sees another, and each begins at position 0.

That is said by positions alone: where they begin anew, transformers' masks part the sequence into blocks, in every
family and in the mixture.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def keep_apart(model: PreTrainedModel, end_of_text_id: int) -> None:
    """Let all later calls of `model` with `input_ids` and without a cache keep documents apart."""

    def add_positions(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        input_ids = args[0] if args else kwargs["input_ids"]  # some families give it by place, all the rest by name
        return args, {**kwargs, "position_ids": positions(input_ids, end_of_text_id)}

    model.base_model.register_forward_pre_hook(add_positions, with_kwargs=True)


def positions(input_ids: Tensor, end_of_text_id: int) -> Tensor:
    """[B, L] -> each token's place in its document, int64 [B, L]; an end-of-text token belongs to what it ends."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    starts = torch.zeros_like(places)
    starts[:, 1:] = places[:, 1:].where(input_ids[:, :-1] == end_of_text_id, 0)
    return places - starts.cummax(dim=1).values
