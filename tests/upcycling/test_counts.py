"""Counts of tokens and pairs equal those of a loop, and the weights of embedding rows follow from them."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bam_ray.errors import DataError
from bam_ray.model.bigrams_bam import pair_bucket
from bam_ray.upcycling.routers import counts as module
from bam_ray.upcycling.routers.counts import TokenCounts, count_tokens, row_weights

END = 0


def reference(stream: list[int], vocab_size: int, buckets: int) -> tuple[list[int], list[int]]:
    """Count the tokens and the pairs of a stream one by one."""
    tokens = Counter(stream)
    pairs = Counter(
        int(pair_bucket(torch.tensor(one), torch.tensor(other), vocab_size, buckets))
        for one, other in pairwise(stream)
        if one != END
    )
    return [tokens[each] for each in range(vocab_size)], [pairs[each] for each in range(buckets)]


def counts_of(*tokens: int) -> TokenCounts:
    return TokenCounts(torch.tensor(tokens), torch.zeros(4, dtype=torch.int64))


@given(
    rows=st.integers(1, 6),
    length=st.integers(1, 9),
    vocab_size=st.sampled_from([4, 40]),
    dtype=st.sampled_from(["<u2", "<u4"]),
    seed=st.integers(0, 100),
)
@pytest.mark.parametrize("chunk", [1, 10, 1 << 20])
def test_counts_equal_those_of_a_loop(
    chunk: int, rows: int, length: int, vocab_size: int, dtype: str, seed: int
) -> None:
    stream = np.random.default_rng(seed).integers(0, vocab_size, (rows, length)).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_TOKENS", chunk)
        found = count_tokens(stream, vocab_size, END, buckets=100)
    assert found.tokens.dtype == found.pairs.dtype == torch.int64
    assert (found.tokens.tolist(), found.pairs.tolist()) == reference(stream.flatten().tolist(), vocab_size, 100)


def test_counts_by_hand() -> None:
    """Two documents, 1 2 2 and 2 1, in rows of three tokens; no pair begins with the end of a document."""
    found = count_tokens(np.array([[1, 2, 2], [END, 2, 1]], np.uint16), 3, END, buckets=9)
    assert found.tokens.tolist() == [1, 2, 3]
    pairs = {(index // 3, index % 3): count for index, count in enumerate(found.pairs.tolist()) if count}
    assert pairs == {(1, 2): 1, (2, 2): 1, (2, END): 1, (2, 1): 1}
    assert found.total == 6


def test_rows_may_be_mapped_from_disk(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 50, (7, 8)).astype("<u4")
    rows.tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype="<u4", mode="r").reshape(-1, 8)
    one, other = (count_tokens(each, 50, END) for each in (rows, mapped))
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.pairs, other.pairs)
    assert one.pairs.shape == (1 << 20,)
    assert one.pairs.sum() == 55 - (rows.flatten()[:-1] == END).sum()


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match="the text has token 9, but the vocabulary has only 9 tokens: use the"):
        count_tokens(np.array([[1, 9, 2]], np.uint16), 9, END)


def test_weights_by_hand() -> None:
    """Both texts are scaled to 60 tokens; the third token is in neither, and the fourth row has no token."""
    weights = row_weights([counts_of(10, 10, 0), counts_of(0, 100, 0)], 4)
    expected = torch.tensor([[31 / 32, 31 / 92, 0.5, 0.5], [1 / 32, 61 / 92, 0.5, 0.5]])
    torch.testing.assert_close(weights, expected)
    assert weights.dtype == torch.float32


@given(st.lists(st.lists(st.integers(0, 10**6), min_size=5, max_size=5).filter(sum), min_size=1, max_size=4))
def test_weights_of_a_row_sum_to_one(tokens: list[list[int]]) -> None:
    weights = row_weights([counts_of(*each) for each in tokens], 7)
    torch.testing.assert_close(weights.sum(0), torch.ones(7))
    torch.testing.assert_close(weights[:, 5:], torch.full((len(tokens), 2), 1 / len(tokens)))


def test_a_larger_text_of_the_same_kind_has_no_more_weight() -> None:
    once = counts_of(3, 7, 0)
    often = TokenCounts(once.tokens * 1000, once.pairs)
    torch.testing.assert_close(row_weights([once, often], 3), torch.full((2, 3), 0.5))
