"""Pairs of adjacent tokens, which are counted in a table of buckets.

A small vocabulary has one bucket for each pair. A large one has too many pairs, so several of them share a bucket.
"""

from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Ids = TypeVar("Ids", Tensor, "NDArray[np.int64]")
"""Token ids, or buckets, as int64 of any shape."""


def pair_bucket(previous: Ids, current: Ids, vocab_size: int, buckets: int) -> Ids:
    """Return the bucket of each pair of adjacent tokens, int64 in [0, buckets).

    With `vocab_size`² <= `buckets`, each pair has its own bucket, `previous * vocab_size + current`. Otherwise the
    bucket is a hash, and the pairs of a large vocabulary are spread evenly over all buckets.

    Args:
        previous: The first token of each pair, int64.
        current: The second token of each pair, int64, of the same shape.
        vocab_size: The number of tokens.
        buckets: The number of buckets.
    """
    if vocab_size**2 <= buckets:
        return previous * vocab_size + current
    # A multiplicative hash. No product reaches 2**63: (2**31 - 1) * 0x9E3779B1 is less than 2**62.4
    mixed = ((previous * 1_000_003 + current) & 0x7FFFFFFF) * 0x9E3779B1
    return (mixed >> 11) % buckets
