"""Perplexity of any Hugging Face causal LM on packed sequences, and a mixture's routing from the same forward passes.

Perplexity is exp of the mean next-token NLL, auxiliary losses not counted: in a sequence of L tokens the first has no
prediction and the last gives none, so L - 1 count. Logits become fp32 before the softmax; the model's own precision is
the caller's affair (evaluation loads fp32).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.errors import CheckpointError, DataError
from bam_ray.evaluation.results import DomainRouting, DomainScore
from bam_ray.evaluation.routing import RoutingTally
from bam_ray.model import is_mixture


def perplexity(model: PreTrainedModel, sequences: np.ndarray, batch_sequences: int) -> DomainScore:
    """The score of `sequences` [S, L] of token ids; the same for any `batch_sequences`."""
    return score(model, sequences, batch_sequences)[0]


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    sequences: np.ndarray,
    batch_sequences: int,
    between_batches: Callable[[], None] | None = None,
) -> tuple[DomainScore, DomainRouting | None]:
    """The score of `sequences` [S, L], and for mixtures their routing.

    `between_batches` is called after each batch; what it raises ends the evaluation. Raises `DataError` where there is
    nothing to predict, `CheckpointError` where the NLL is not finite.
    """
    if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < 2:
        raise DataError(f"held-out sequences of shape {list(sequences.shape)} hold nothing to predict: add text")
    mixed = is_mixture(model.config) and model.config.mixture_layers
    tally = RoutingTally(model.config, model.selection_biases()) if mixed else None
    wanted: dict[str, Any] = {} if tally is None else {"output_router_logits": True}
    was_training = model.training
    model.eval()
    sequence_nll: list[float] = []
    try:
        for start in range(0, len(sequences), batch_sequences):
            batch = np.asarray(sequences[start : start + batch_sequences]).astype(np.int64)
            ids = torch.from_numpy(batch).to(model.device)
            out = model(input_ids=ids, use_cache=False, **wanted)
            sequence_nll += mean_nll(out.logits, ids)
            if tally is not None:
                tally.add(out)
            if between_batches is not None:
                between_batches()
    finally:
        model.train(was_training)
    if not np.isfinite(sequence_nll).all():
        raise CheckpointError("the model's NLL is not finite: its weights are damaged or its training diverged")
    tokens = sequences.shape[0] * (sequences.shape[1] - 1)
    return DomainScore.of(sequence_nll, tokens), None if tally is None else tally.routing()


def mean_nll(logits: Tensor, ids: Tensor) -> list[float]:
    """Mean NLL of each sequence: logits [B, L, V], ids [B, L] -> B numbers.

    One sequence at a time: a fp32 copy of all logits would be the largest tensor of the evaluation.
    """
    return [
        F.cross_entropy(row[:-1].float(), targets[1:], reduction="none").mean(dtype=torch.double).item()
        for row, targets in zip(logits, ids, strict=True)
    ]
