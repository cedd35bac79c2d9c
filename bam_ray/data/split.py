"""Which documents are held out: decided by document and seed, before anything else sees the text."""

import zlib

import numpy as np
from numpy.typing import NDArray

from bam_ray.data.deduplicate import MOST_SHARED
from bam_ray.errors import DataError


def split(
    domain: str,
    characters: NDArray[np.int64],
    shared: NDArray[np.float64],
    held_out_fraction: float,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the documents to train on and of those held out, about `held_out_fraction` of all characters.

    Documents are tried in random order and held out where they still fit; those that share more than `MOST_SHARED` of
    their word sequences with others come after all that don't, the most shared last. At least one is held out, and
    one is left to train on. Raises `DataError` where there are fewer than two.
    """
    if len(characters) < 2:
        raise DataError(
            f"domain {domain} has {len(characters)} document after near-duplicates are dropped, and a document is "
            "either trained on or held out: give at least 2 (several files, or a record each in a JSONL file)"
        )
    order = np.random.default_rng([seed, zlib.crc32(domain.encode())]).permutation(len(characters))
    order = order[np.argsort(np.where(shared > MOST_SHARED, shared, 0.0)[order], kind="stable")]
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
