"""The split of a domain into training and held-out documents, decided by document and seed before any training."""

import zlib

import numpy as np
from numpy.typing import NDArray

from bam_ray.data.deduplicate import MAX_SHARED_FRACTION
from bam_ray.errors import DataError


def split_documents(
    domain: str,
    characters: NDArray[np.int64],
    shared: NDArray[np.float64],
    held_out_fraction: float,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose held-out documents with about `held_out_fraction` of all characters.

    Documents are considered in random order and held out if they still fit. Those that share more than
    `MAX_SHARED_FRACTION` of their n-grams with other documents are considered after all others, in ascending order of
    the shared fraction. At least one document is held out and at least one is left for training.

    Args:
        domain: The name of the domain, which is part of the random seed.
        characters: The length of each document.
        shared: The fraction of each document's n-grams that occur in another document.
        held_out_fraction: The fraction of characters to hold out.
        seed: The seed of the random order.

    Returns:
        The indices of the training documents and of the held-out documents, both sorted.

    Raises:
        DataError: There are fewer than two documents.
    """
    if len(characters) < 2:
        raise DataError(
            f"domain {domain} has {len(characters)} document after near-duplicates are dropped, and a document is "
            "either trained on or held out: provide at least 2 (several files, or one record each in a JSONL file)"
        )
    order = np.random.default_rng([seed, zlib.crc32(domain.encode())]).permutation(len(characters))
    order = order[np.argsort(np.where(shared > MAX_SHARED_FRACTION, shared, 0.0)[order], kind="stable")]
    left = held_out_fraction * int(characters.sum())
    held_out: list[int] = []
    for index in order.tolist():
        if characters[index] <= left and len(held_out) < len(characters) - 1:
            held_out.append(index)
            left -= characters[index]
    if not held_out:  # every document is larger than the part to hold out
        held_out.append(int(np.argmin(characters)))
    chosen = np.zeros(len(characters), dtype=bool)
    chosen[held_out] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
