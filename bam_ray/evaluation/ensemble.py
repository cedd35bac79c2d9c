"""Output ensembles of the seed and the branches: the baseline without upcycling and mixing.

The probability of a token is the weighted mean of the probabilities that the N members give it:

    p(x_t | x_<t) = Σ_i w_i,t p_i(x_t | x_<t)

- Uniform: w_i,t = 1 / N.
- Posterior: w_i,t is the probability of member i after the earlier tokens of the same document, with a uniform prior
  (DEMix, arXiv 2108.05036; Branch-Train-Merge, arXiv 2208.03306). So log w_t is the log-softmax over the members of
  Σ_{s<t} log p_i(x_s | x_<s). In a document, the total NLL of this ensemble is at most that of its best member plus
  log N.

Both need only the NLL that each member gives to the tokens of the text. Everything is computed in double precision and
with logarithms. Shapes: N members, S sequences, L tokens in a sequence, L - 1 of them predicted.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from bam_ray.checkpoint.manifest import identity
from bam_ray.evaluation.results import DomainScore, ModelKind, ModelScore
from bam_ray.evaluation.serving_cost import ServingCost

Weights = Literal["posterior", "uniform"]

MEMBER_KINDS: tuple[ModelKind, ...] = ("seeds", "branches")


def ensemble_nll(token_nll: np.ndarray, starts: np.ndarray, weights: Weights) -> np.ndarray:
    """Return the NLL that an output ensemble gives to each token, float64 [S, L - 1].

    Args:
        token_nll: The NLL that each member gives to each predicted token, in nats, [N, S, L - 1].
        starts: True for the predicted tokens that begin a document (see `document_starts`), bool [S, L - 1].
        weights: The weights of the members. With "posterior", those of the first token of a document are uniform.
    """
    log_p = -np.asarray(token_nll, dtype=np.float64)
    log_prior = -np.log(len(log_p))
    if weights == "uniform":
        return np.asarray(-np.logaddexp.reduce(log_prior + log_p, axis=0))
    before = _sum_before(log_p, starts)
    log_weights = before - np.logaddexp.reduce(before, axis=0)
    return np.asarray(-np.logaddexp.reduce(log_weights + log_p, axis=0))


def document_starts(sequences: np.ndarray, end_of_text_id: int | None) -> np.ndarray:
    """Return which predicted tokens begin a document, bool [S, L - 1], for token ids `sequences` [S, L].

    The first predicted token of a sequence always does. Another one does if the token before it is `end_of_text_id`.
    With None, documents are not kept apart, and a sequence counts as one document.
    """
    starts = np.zeros((sequences.shape[0], sequences.shape[1] - 1), dtype=bool)
    if end_of_text_id is not None:
        starts |= np.asarray(sequences[:, :-1]) == end_of_text_id
    starts[:, 0] = True
    return starts


def ensemble_scores(
    members: Sequence[ModelScore],
    token_nll: Sequence[Mapping[str, np.ndarray]],
    starts: Mapping[str, np.ndarray],
    lineage_tokens: int,
    lineage_flops: float,
) -> list[ModelScore]:
    """Return the scores of the two ensembles of the seed and the branches; empty if there is no branch.

    All members compute every token, so all parameters of an ensemble are active. It has no training of its own.

    Args:
        members: The seed and the branches.
        token_nll: For each member, the NLL of each token by domain, [S, L - 1].
        starts: The tokens that begin a document, by domain, [S, L - 1].
        lineage_tokens: The training tokens of all members and of what they were made from.
        lineage_flops: The FLOPs of the same.
    """
    if not any(member.kind == "branches" for member in members):
        return []
    costs = [member.serving for member in members if member.serving is not None]
    stacked = {domain: np.stack([each[domain] for each in token_nll]) for domain in starts}

    def score(weights: Weights) -> ModelScore:
        nll = {domain: ensemble_nll(each, starts[domain], weights) for domain, each in stacked.items()}
        return ModelScore(
            id=identity(weights, {}, tuple(member.id for member in members)),
            name=weights,
            kind="ensembles",
            parameters=sum(member.parameters for member in members),
            active_parameters=sum(member.parameters for member in members),
            lineage_tokens=lineage_tokens,
            lineage_flops=lineage_flops,
            serving=ServingCost.of_all(costs) if len(costs) == len(members) else None,
            branches=tuple(member.name for member in members if member.kind == "branches"),
            domains={
                d: DomainScore.from_sequence_nll(each.mean(axis=1).tolist(), each.size) for d, each in nll.items()
            },
        )

    return [score(weights) for weights in get_args(Weights)]


def _sum_before(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the sum of the earlier values of the same document at each token, [N, S, T], for `values` [N, S, T]."""
    before = np.cumsum(values, axis=-1) - values
    first = np.maximum.accumulate(np.where(starts, np.arange(starts.shape[-1]), 0), axis=-1)
    return np.asarray(before - np.take_along_axis(before, first[None], axis=-1))
