"""Perplexity of any Hugging Face causal language model on packed sequences, and the routing of a mixture.

Perplexity is the exponential of the mean next-token NLL, without auxiliary losses. In a sequence of L tokens the first
token has no prediction and the last token predicts nothing, so L - 1 tokens count. Logits are converted to fp32 before
the softmax. The caller chooses the precision of the model; the evaluate stage loads models in fp32.
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
from bam_ray.evaluation.routing import RoutingAccumulator
from bam_ray.model import is_mixture


def perplexity(model: PreTrainedModel, sequences: np.ndarray, batch_sequences: int) -> DomainScore:
    """Return the score of token ids `sequences` [S, L]. It does not depend on `batch_sequences`."""
    return score(model, sequences, batch_sequences)[0]


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    sequences: np.ndarray,
    batch_sequences: int,
    after_batch: Callable[[], None] | None = None,
) -> tuple[DomainScore, DomainRouting | None]:
    """Return the score of a model on token ids, and its routing if the model is a mixture.

    Args:
        model: The model, on its device. Its training mode is restored afterwards.
        sequences: Token ids, [S, L].
        batch_sequences: The number of sequences per forward pass.
        after_batch: Called after each batch. An exception that it raises ends the evaluation.

    Raises:
        DataError: The sequences contain no token to predict.
        CheckpointError: The NLL is not finite.
    """
    if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < 2:
        raise DataError(f"held-out sequences of shape {list(sequences.shape)} have no token to predict: add text")
    has_routers = is_mixture(model.config) and model.config.mixture_layers
    routing = RoutingAccumulator(model.config, model.selection_biases()) if has_routers else None
    outputs: dict[str, Any] = {} if routing is None else {"output_router_logits": True}
    was_training = model.training
    model.eval()
    sequence_nll: list[float] = []
    try:
        for start in range(0, len(sequences), batch_sequences):
            batch = np.asarray(sequences[start : start + batch_sequences]).astype(np.int64)
            ids = torch.from_numpy(batch).to(model.device)
            out = model(input_ids=ids, use_cache=False, **outputs)
            sequence_nll += mean_nll(out.logits, ids)
            if routing is not None:
                routing.add(out)
            if after_batch is not None:
                after_batch()
    finally:
        model.train(was_training)
    if not np.isfinite(sequence_nll).all():
        raise CheckpointError(
            "the model's NLL is not finite, so its weights are damaged or its training diverged: restore an earlier "
            "checkpoint"
        )
    tokens = sequences.shape[0] * (sequences.shape[1] - 1)
    return DomainScore.from_sequence_nll(sequence_nll, tokens), None if routing is None else routing.routing()


def mean_nll(logits: Tensor, ids: Tensor) -> list[float]:
    """Return the mean NLL of each sequence: logits [B, L, V], ids [B, L] -> B numbers.

    The loop converts one sequence at a time, because an fp32 copy of all logits would be the largest tensor of the
    evaluation.
    """
    return [
        F.cross_entropy(row[:-1].float(), targets[1:], reduction="none").mean(dtype=torch.double).item()
        for row, targets in zip(logits, ids, strict=True)
    ]
