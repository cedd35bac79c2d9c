"""The bucket of a pair of tokens, in tables of hashed counts."""

from typing import Any


def pair_bucket(previous: Any, current: Any, vocab_size: int, buckets: int) -> Any:
    """Return the bucket in [0, buckets) of each pair of token ids, int64 tensors or arrays of equal shape.

    Each pair has a bucket of its own if there are enough of them.
    """
    if vocab_size**2 <= buckets:
        return previous * vocab_size + current
    return (((previous * 1_000_003 + current) & 0x7FFFFFFF) * 0x9E3779B1 >> 11) % buckets
