"""Buckets of pairs of tokens: exact for small vocabularies, and an even hash for large ones."""

import numpy as np
import pytest
import torch

from bam_ray.model.bigrams_bam import pair_bucket

BUCKETS = 1 << 20


def random_pairs(vocab_size: int, count: int = 1_000_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distinct random pairs of tokens, as two tensors of about `count` tokens."""
    numbers = torch.randint(0, vocab_size**2, (count,), generator=torch.Generator().manual_seed(0)).unique()
    return numbers // vocab_size, numbers % vocab_size


@pytest.mark.parametrize("vocab_size", [96, 1024])
def test_small_vocabularies_have_a_bucket_for_each_pair(vocab_size: int) -> None:
    tokens = torch.arange(vocab_size)
    buckets = pair_bucket(tokens[:, None], tokens[None, :], vocab_size, BUCKETS)
    assert torch.equal(buckets.flatten(), torch.arange(vocab_size**2))


@pytest.mark.parametrize("vocab_size", [300, 1025, 50_000, 256_000])
def test_numpy_and_torch_agree(vocab_size: int) -> None:
    previous, current = random_pairs(vocab_size, 10_000)
    expected = pair_bucket(previous, current, vocab_size, BUCKETS)
    found = pair_bucket(previous.numpy(), current.numpy(), vocab_size, BUCKETS)
    assert found.dtype == np.int64
    assert torch.equal(torch.from_numpy(found), expected)


@pytest.mark.parametrize("buckets", [1 << 20, 1_000_003, 7])
def test_no_product_overflows(buckets: int) -> None:
    """The buckets of large tokens are those of Python's integers, which have no largest value."""
    ids = [0, 1, 99_999, 262_143, 2**31 - 1, 2**32 - 1]
    previous, current = (torch.tensor(each).flatten() for each in zip(*[(a, b) for a in ids for b in ids], strict=True))
    found = pair_bucket(previous, current, 2**32, buckets).tolist()
    exact = [(((a * 1_000_003 + b) & 0x7FFFFFFF) * 0x9E3779B1 >> 11) % buckets for a in ids for b in ids]
    assert found == exact
    assert all(0 <= bucket < buckets for bucket in found)


@pytest.mark.parametrize("vocab_size", [8192, 50_000, 256_000])
def test_pairs_of_large_vocabularies_spread_evenly(vocab_size: int) -> None:
    buckets = pair_bucket(*random_pairs(vocab_size), vocab_size, BUCKETS)
    counts = torch.bincount(buckets, minlength=BUCKETS).double()
    mean = counts.mean()
    assert counts.var() / mean == pytest.approx(1.0, abs=0.05)  # as if each pair had drawn its bucket
    groups = counts.view(1024, -1).sum(1)  # by the upper bits, and by the lower ones
    other_groups = counts.view(-1, 1024).sum(0)
    for sums in (groups, other_groups):
        assert (sums - sums.mean()).abs().max() < 6 * sums.mean().sqrt()
