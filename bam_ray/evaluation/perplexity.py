"""Perplexity of any Hugging Face causal language model on packed sequences, and the routing of a mixture.

Perplexity is the exponential of the mean next-token NLL, without auxiliary losses. In a sequence of L tokens the first
token has no prediction and the last token predicts nothing, so L - 1 tokens count. Logits are computed for one chunk of
a sequence at a time, and are converted to fp32 before the softmax. The caller chooses the precision of the model.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.errors import CheckpointError, DataError
from bam_ray.evaluation.results import DomainRouting, DomainScore
from bam_ray.evaluation.routing import RoutingAccumulator
from bam_ray.model import RouterOutput, is_mixture
from bam_ray.training.memory import memory_of
from bam_ray.training.micro_batch import halve_until_it_fits
from bam_ray.training.next_token import NextTokenLoss


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
        batch_sequences: The number of sequences per forward pass. It is halved each time memory runs out.
        after_batch: Called after each batch. An exception that it raises ends the evaluation.

    Raises:
        DataError: The sequences contain no token to predict.
        CheckpointError: The NLL is not finite.
        TrainingError: A single sequence does not fit into memory.
    """
    if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < 2:
        raise DataError(f"held-out sequences of shape {list(sequences.shape)} have no token to predict: add text")
    has_routers = is_mixture(model.config) and model.config.mixture_layers
    routing = RoutingAccumulator(model.config, model.selection_biases()) if has_routers else None
    next_token, memory = NextTokenLoss(model), memory_of(str(model.device))
    was_training = model.training
    model.eval()
    nll_of: list[list[float]] = []  # of each batch
    start, size = 0, batch_sequences
    try:
        while start < len(sequences):
            batch = _Batch(next_token, sequences[start : start + size])
            size = halve_until_it_fits(batch.compute, size, memory)
            nll_of.append(batch.nll)
            start += len(batch.nll)
            if routing is not None:
                routing.add(batch.router_outputs, batch.attention_router_logits)
            if after_batch is not None:
                after_batch()
    finally:
        model.train(was_training)
    sequence_nll = list(chain.from_iterable(nll_of))
    if not np.isfinite(sequence_nll).all():
        raise CheckpointError(
            "the model's NLL is not finite, so its weights are damaged or its training diverged: restore an earlier "
            "checkpoint"
        )
    tokens = sequences.shape[0] * (sequences.shape[1] - 1)
    return DomainScore.from_sequence_nll(sequence_nll, tokens), None if routing is None else routing.routing()


class _Batch:
    """Sequences [S, L] and what a model computes for the first of them, as many as fit into memory.

    The hidden states are dropped at once. The routers' outputs are small.
    """

    def __init__(self, next_token: NextTokenLoss, sequences: np.ndarray) -> None:
        self._next_token, self._sequences = next_token, sequences
        self.nll: list[float] = []
        self.router_outputs: Sequence[RouterOutput] = ()
        self.attention_router_logits: Sequence[Tensor] = ()

    def compute(self, count: int) -> None:
        """Compute the first `count` sequences."""
        ids = torch.from_numpy(np.asarray(self._sequences[:count]).astype(np.int64))
        self.nll, out = self._next_token.sequence_nll(ids.to(self._next_token.model.device))
        self.router_outputs = getattr(out, "router_outputs", ())
        self.attention_router_logits = getattr(out, "attention_router_logits", ())
