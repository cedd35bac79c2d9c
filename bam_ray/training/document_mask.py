"""Keep the documents of one sequence apart: no document attends to another, and each starts at position 0.

The positions alone express this. When they restart, the masks of transformers split the sequence into blocks, in every
family and in the mixture.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def mask_documents(model: PreTrainedModel, end_of_text_id: int) -> None:
    """Keep documents apart in all later calls of `model` with `input_ids` and without a cache."""

    def add_positions(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        input_ids = args[0] if args else kwargs["input_ids"]  # some families pass it by position, the others by name
        return args, {**kwargs, "position_ids": document_positions(input_ids, end_of_text_id)}

    model.base_model.register_forward_pre_hook(add_positions, with_kwargs=True)


def document_positions(input_ids: Tensor, end_of_text_id: int) -> Tensor:
    """Return each token's position in its document, int64 [B, L], for `input_ids` [B, L].

    An end-of-text token belongs to the document that it ends.
    """
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    starts = torch.zeros_like(places)
    starts[:, 1:] = places[:, 1:].where(input_ids[:, :-1] == end_of_text_id, 0)
    return places - starts.cummax(dim=1).values
