"""Perplexity of any Hugging Face causal language model on packed sequences, and the routing of a mixture.

Perplexity is the exponential of the mean next-token NLL, without auxiliary losses. In a sequence of L tokens the first
token has no prediction and the last token predicts nothing, so L - 1 tokens count. Logits are computed for one chunk of
a sequence at a time, and are converted to fp32 before the softmax. The caller chooses the precision of the model.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class DomainEvaluation(NamedTuple):
    """The score of one model on the sequences of one domain, its routing, and the NLL of each token."""

    score: DomainScore
    routing: DomainRouting | None  # None: the model is not a mixture
    token_nll: np.ndarray  # NLL of each predicted token in nats, float32 [S, L - 1]


def perplexity(model: PreTrainedModel, sequences: np.ndarray, batch_sequences: int) -> DomainScore:
    """Return the score of token ids `sequences` [S, L]. It does not depend on `batch_sequences`."""
    return score(model, sequences, batch_sequences).score


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    sequences: np.ndarray,
    batch_sequences: int,
    after_batch: Callable[[], None] | None = None,
) -> DomainEvaluation:
    """Return the score of a model on token ids, the NLL of each token, and the routing if the model is a mixture.

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
    batches: list[Tensor] = []  # NLL of each token of a batch
    start, size = 0, batch_sequences
    try:
        while start < len(sequences):
            batch = _Batch(next_token, sequences[start : start + size])
            size = halve_until_it_fits(batch.compute, size, memory)
            batches.append(batch.nll)
            start += len(batch.nll)
            if routing is not None:
                routing.add(batch.router_outputs, batch.attention_router_logits)
            if after_batch is not None:
                after_batch()
    finally:
        model.train(was_training)
    token_nll = torch.cat(batches)
    sequence_nll = [row.mean(dtype=torch.double).item() for row in token_nll]
    if not np.isfinite(sequence_nll).all():
        raise CheckpointError(
            "the model's NLL is not finite, so its weights are damaged or its training diverged: restore an earlier "
            "checkpoint"
        )
    tokens = sequences.shape[0] * (sequences.shape[1] - 1)
    return DomainEvaluation(
        score=DomainScore.from_sequence_nll(sequence_nll, tokens),
        routing=None if routing is None else routing.routing(),
        token_nll=token_nll.numpy(),
    )


class _Batch:
    """Sequences [S, L] and what a model computes for the first of them, as many as fit into memory.

    The hidden states are dropped at once. The routers' outputs are small.
    """

    def __init__(self, next_token: NextTokenLoss, sequences: np.ndarray) -> None:
        self._next_token, self._sequences = next_token, sequences
        self.nll = torch.empty(0, 0)  # of each token, fp32 [S, L - 1] on the CPU
        self.router_outputs: Sequence[RouterOutput] = ()
        self.attention_router_logits: Sequence[Tensor] = ()

    def compute(self, count: int) -> None:
        """Compute the first `count` sequences."""
        ids = torch.from_numpy(np.asarray(self._sequences[:count]).astype(np.int64))
        nll, out = self._next_token.token_nll(ids.to(self._next_token.model.device))
        self.nll = nll.cpu()
        self.router_outputs = getattr(out, "router_outputs", ())
        self.attention_router_logits = getattr(out, "attention_router_logits", ())
