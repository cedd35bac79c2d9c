"""The sampler: the order is independent of batches, rows come once per epoch, and resuming is exact."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bam_ray.data import BlendedSampler, Corpus
from bam_ray.errors import DataError

SIZES = {"code": 7, "general": 300, "law": 2}
BLEND = {"general": 2.0, "code": 1.0, "law": 1.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Return a corpus in which row i of domain number d is [d, i]."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, (domain, size) in enumerate(SIZES.items()):
        (folder / domain).mkdir()
        rows = np.stack([np.full(size, number), np.arange(size)], axis=1).astype("<u2")
        rows.tofile(folder / domain / "train.bin")
    facts = {
        "sequence_length": 2,
        "vocab_size": 300,
        "end_of_text_id": 0,
        "dtype": "<u2",
        "attend_across_documents": True,
    }
    facts |= {"domains": dict(SIZES)}
    (folder / "corpus.json").write_text(json.dumps(facts))
    return Corpus(folder)


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=8), seed=st.integers(0, 2**40))
def test_the_order_does_not_depend_on_batches(corpus: Corpus, cuts: list[int], seed: int) -> None:
    whole = BlendedSampler(corpus, BLEND, seed)
    batches = BlendedSampler(corpus, BLEND, seed)
    expected = whole.take(sum(cuts))[0]
    taken = np.concatenate([np.empty((0, 2), dtype=np.int64), *(batches.take(count)[0] for count in cuts)])
    assert taken.dtype == np.int64
    assert np.array_equal(taken, expected)
    assert whole.drawn == batches.drawn


@settings(deadline=None)
@given(before=st.integers(0, 100), after=st.integers(1, 100), seed=st.integers(0, 9))
def test_a_resumed_sampler_continues_exactly(corpus: Corpus, before: int, after: int, seed: int) -> None:
    original = BlendedSampler(corpus, BLEND, seed)
    original.take(before)
    resumed = BlendedSampler(corpus, BLEND, seed)
    resumed.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert np.array_equal(resumed.take(after)[0], original.take(after)[0])
    assert resumed.state_dict() == original.state_dict()


def test_new_weights_apply_from_now_on_and_are_resumed(corpus: Corpus) -> None:
    sampler, plain = BlendedSampler(corpus, BLEND, 0), BlendedSampler(corpus, BLEND, 0)
    assert np.array_equal(sampler.take(50)[0], plain.take(50)[0])
    weights = {"law": 7.0, "code": 2.0, "general": 1.0}
    sampler.set_weights(weights)
    assert sampler.weights == pytest.approx({"code": 0.2, "general": 0.1, "law": 0.7})
    resumed = BlendedSampler(corpus, BLEND, 0)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    before = sampler.drawn
    assert np.array_equal(sampler.take(2000)[0], resumed.take(2000)[0])
    drawn = {domain: (count - before[domain]) / 2000 for domain, count in sampler.drawn.items()}
    assert drawn == pytest.approx(sampler.weights, abs=0.04)


def test_every_epoch_visits_each_row_once_in_a_new_order(corpus: Corpus) -> None:
    rows = BlendedSampler(corpus, {"code": 1.0}, 3).take(7 * 20)[0][:, 1].reshape(20, 7)
    assert (np.sort(rows, axis=1) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in rows}) > 10


def test_domains_are_drawn_by_weight(corpus: Corpus) -> None:
    sampler = BlendedSampler(corpus, {"general": 6.0, "code": 2.0, "law": 0.0}, 0)
    batch, domains = sampler.take(20_000)
    assert np.array_equal(domains, np.eye(2)[batch[:, 0]])
    counts = np.bincount(batch[:, 0], minlength=3)
    assert sampler.drawn == {"code": counts[0], "general": counts[1]}
    assert counts[2] == 0
    assert abs(counts[1] / 20_000 - 0.75) < 4 * (0.75 * 0.25 / 20_000) ** 0.5


def test_the_order_depends_on_the_seed_only(corpus: Corpus) -> None:
    first = BlendedSampler(corpus, BLEND, 0).take(50)[0]
    assert np.array_equal(first, BlendedSampler(corpus, dict(reversed(BLEND.items())), 0).take(50)[0])
    assert np.array_equal(
        first, BlendedSampler(corpus, {name: 9 * weight for name, weight in BLEND.items()}, 0).take(50)[0]
    )
    assert not np.array_equal(first, BlendedSampler(corpus, BLEND, 1).take(50)[0])


def test_a_far_position_is_resumed_without_replay(corpus: Corpus) -> None:
    sampler = BlendedSampler(corpus, {"general": 1.0}, 0)
    sampler.load_state_dict({"position": 10**12, "drawn": {"general": 10**12}, "weights": {"general": 1.0}})
    assert sampler.take(3)[0].shape == (3, 2)
    assert sampler.drawn == {"general": 10**12 + 3}


@pytest.mark.parametrize("blend", [{}, {"code": 0.0}, {"code": -1.0}, {"code": float("nan")}, {"code": float("inf")}])
def test_invalid_blends_are_refused(corpus: Corpus, blend: dict[str, float]) -> None:
    with pytest.raises(DataError, match="the weights of a blend"):
        BlendedSampler(corpus, blend, 0)


def test_unknown_domains_and_foreign_states_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no domain 'poetry'"):
        BlendedSampler(corpus, {"poetry": 1.0}, 0)
    with pytest.raises(DataError, match="sampler state is for a blend of"):
        BlendedSampler(corpus, BLEND, 0).load_state_dict(BlendedSampler(corpus, {"law": 1.0}, 0).state_dict())
