"""Near-duplicates, the split, and the overlap of held-out and training text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bam_ray.data.deduplicate import NGRAM_WORDS, NGramSet, leaked_fraction, ngram_hashes, shared_fractions
from bam_ray.data.split import split_documents
from bam_ray.errors import DataError


def prose(start: int, count: int) -> str:
    """Return `count` distinct words, numbered from `start` on."""
    return " ".join(f"w{number}" for number in range(start, start + count))


def test_ngrams_have_13_words() -> None:
    hashes = ngram_hashes(prose(0, 20))
    assert len(hashes) == 20 - NGRAM_WORDS + 1
    assert (np.diff(hashes.astype(object)) > 0).all()
    assert np.isin(ngram_hashes(prose(5, 13)), hashes).all()
    assert not np.isin(ngram_hashes(prose(5, 12)), hashes).any()


def test_ngrams_ignore_case_and_punctuation_but_not_order() -> None:
    text = prose(0, 14)
    assert np.array_equal(ngram_hashes(text), ngram_hashes("* " + text.upper().replace(" ", ", ") + "!\n"))
    assert not np.isin(ngram_hashes(" ".join(reversed(text.split()))), ngram_hashes(text)).any()


def test_a_short_text_is_a_single_ngram() -> None:
    short = [ngram_hashes(text) for text in ("a b", "b a", "a b c", "?!", "!?")]
    assert [len(hashes) for hashes in short] == [1] * 5
    assert len(np.unique(np.concatenate(short))) == 5


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=1), min_size=1, max_size=8), st.integers(1, 20))
def test_an_ngram_set_is_a_set(documents: list[list[int]], merge_at: int) -> None:
    """The result does not depend on when recent hashes are merged."""
    seen = NGramSet(merge_at)
    expected: set[int] = set()
    for numbers in documents:
        hashes = np.unique(np.array(numbers, dtype=np.uint64))
        assert seen.fraction(hashes) == sum(int(n) in expected for n in hashes) / len(hashes)
        seen.add(hashes)
        expected.update(numbers)


def test_shared_and_leaked_fractions() -> None:
    whole, half, own = (ngram_hashes(text) for text in (prose(0, 112), prose(50, 112), prose(1000, 112)))
    assert shared_fractions([whole, half, own]).tolist() == [0.5, 0.5, 0.0]
    assert leaked_fraction([half], [whole, own]) == 0.5
    assert leaked_fraction([own], [whole, half]) == 0.0
    assert leaked_fraction([whole], [own, whole]) == 1.0


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.sampled_from([0.0, 0.04, 0.1, 0.7])), min_size=2, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_a_split_is_disjoint_complete_and_near_the_fraction(
    parts: list[tuple[int, float]], fraction: float, seed: int
) -> None:
    characters = np.array([part[0] for part in parts])
    shared = np.array([part[1] for part in parts])
    train, held_out = split_documents("law", characters, shared, fraction, seed)
    assert sorted([*train, *held_out]) == list(range(len(parts)))
    assert len(train)
    assert len(held_out)
    left = fraction * characters.sum() - characters[held_out].sum()
    if left < 0:  # no document fits, so the smallest one is held out
        assert held_out.tolist() == [characters.argmin()]
    elif len(train) > 1:  # otherwise the last document is kept for training
        assert (characters[train] > left).all()
    again = split_documents("law", characters, shared, fraction, seed)
    assert np.array_equal(again[0], train)


def test_a_split_prefers_documents_without_overlap() -> None:
    characters = np.full(100, 10)
    shared = np.where(np.arange(100) % 2, 0.3, 0.01)
    chosen = [
        split_documents(*domain, 0.2, seed)[1]
        for seed in (0, 1)
        for domain in (("a", characters, shared), ("b", characters, shared))
    ]
    for held_out in chosen:
        assert len(held_out) == 20
        assert (held_out % 2 == 0).all()
    assert len({tuple(held_out) for held_out in chosen}) == 4


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"domain law has 1 document .* provide at least 2"):
        split_documents("law", np.array([5]), np.zeros(1), 0.05, 0)
