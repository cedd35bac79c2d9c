"""Counts of the tokens, and of the pairs of adjacent tokens, of each domain's text.

    counts = {domain: count_tokens(corpus.train(domain), corpus.vocab_size, corpus.end_of_text_id) for domain in names}

Pairs are counted by bucket (see `bam_ray.model.bigrams_bam`), so the size of the counts does not grow with the square
of the vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bam_ray.errors import DataError
from bam_ray.model.bigrams_bam import pair_bucket

BUCKETS = 1 << 20
CHUNK_TOKENS = 1 << 20  # tokens that are counted at once


@dataclass(frozen=True)
class TokenCounts:
    """The counts of one text.

    Attributes:
        tokens: The count of each token, int64 [V].
        pairs: The count of the pairs in each bucket, int64 [buckets]. Pairs that two documents form are not counted.
    """

    tokens: Tensor
    pairs: Tensor

    @property
    def total(self) -> int:
        """The number of tokens of the text."""
        return int(self.tokens.sum())


def count_tokens(
    rows: NDArray[np.integer], vocab_size: int, end_of_text_id: int, buckets: int = BUCKETS
) -> TokenCounts:
    """Count the tokens and pairs of packed rows, in memory bounded by one chunk.

    Args:
        rows: Packed rows [S, L] of any integer dtype, which may be mapped from disk. They are one stream of tokens: the
            last token of a row and the first one of the next row are a pair.
        vocab_size: The number of tokens V.
        end_of_text_id: The token after each document.
        buckets: The number of buckets of pairs.

    Raises:
        DataError: A token is not in the vocabulary.
    """
    step = max(1, CHUNK_TOKENS // rows.shape[1])
    chunks = (rows[start : start + step].reshape(-1) for start in range(0, len(rows), step))
    return count_stream(chunks, vocab_size, end_of_text_id, buckets)


def count_stream(
    chunks: Iterable[NDArray[np.integer]], vocab_size: int, end_of_text_id: int | None, buckets: int = BUCKETS
) -> TokenCounts:
    """Count the tokens and pairs of one stream of tokens.

    Args:
        chunks: The stream, cut anywhere into arrays of one dimension.
        vocab_size: The number of tokens V.
        end_of_text_id: The token after each document; None if documents have no end.
        buckets: The number of buckets of pairs.

    Raises:
        DataError: A token is not in the vocabulary.
    """
    tokens, pairs = np.zeros(vocab_size, np.int64), np.zeros(buckets, np.int64)
    last = np.zeros(0, np.int64)  # the last token of the chunk before
    for chunk in chunks:
        ids = chunk.astype(np.int64)
        if ids.size and ids.max() >= vocab_size:
            raise DataError(
                f"the text has token {ids.max()}, but the vocabulary has only {vocab_size} tokens: use the tokenizer "
                "that belongs to the model"
            )
        tokens += np.bincount(ids, minlength=vocab_size)
        stream = np.concatenate([last, ids])
        previous, current = stream[:-1], stream[1:]
        if end_of_text_id is not None:
            inside = previous != end_of_text_id
            previous, current = previous[inside], current[inside]
        pairs += np.bincount(pair_bucket(previous, current, vocab_size, buckets), minlength=buckets)
        last = stream[-1:]
    return TokenCounts(torch.from_numpy(tokens), torch.from_numpy(pairs))


def row_weights(counts: Sequence[TokenCounts], rows: int) -> Tensor:
    """Return the weight of each model in each row of a merged embedding, fp32 [models, rows].

    A model's weight in the row of a token is its share of the token's counts, with 1 added to each count. The counts
    are scaled to the mean total of all texts first, so that a large text does not have more weight than a small one.
    In the row of a token that no text has, the weights are equal. The weights of a row sum to 1.

    Args:
        counts: The counts of each model's text. No text is empty.
        rows: The number of rows of the embedding. Rows that have no token get equal weights.
    """
    mean_total = sum(each.total for each in counts) / len(counts)
    smoothed = torch.ones(len(counts), rows, dtype=torch.float64)
    for weights, each in zip(smoothed, counts, strict=True):
        weights[: len(each.tokens)] += each.tokens * (mean_total / each.total)
    return (smoothed / smoothed.sum(0)).float()
