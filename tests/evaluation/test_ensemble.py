"""Output ensembles against a plain loop over probabilities, and their bounds."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bam_ray.evaluation.ensemble import Weights, document_starts, ensemble_nll, ensemble_scores
from bam_ray.evaluation.results import MEAN, ModelScore
from tests.support.paper_table import PAPER, model_score

END = 1
ROWS = np.array([[5, 4, END, 7, 8, END, END, 9], [END, 3, 3, 3, 3, 3, 3, END]])
ONE_DOCUMENT = np.zeros((1, 6), dtype=bool)


def random_nll(members: int, rows: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).exponential(2.0, (members, rows, tokens)).astype(np.float32)


def naive(token_nll: np.ndarray, starts: np.ndarray, weights: Weights) -> np.ndarray:
    """Compute the ensemble token by token with explicit probabilities."""
    members, rows, tokens = token_nll.shape
    out = np.empty((rows, tokens))
    for row in range(rows):
        for t in range(tokens):
            if t == 0 or starts[row, t]:
                joint = np.full(members, 1 / members)
            p = np.exp(-token_nll[:, row, t].astype(float))
            w = joint / joint.sum() if weights == "posterior" else np.full(members, 1 / members)
            out[row, t] = -np.log((w * p).sum())
            joint = joint * p
    return out


@pytest.mark.parametrize("weights", get_args(Weights))
@pytest.mark.parametrize("end", [END, None])
def test_an_ensemble_equals_a_loop_over_probabilities(weights: Weights, end: int | None) -> None:
    nll, starts = random_nll(3, *np.subtract(ROWS.shape, (0, 1))), document_starts(ROWS, end)
    found = ensemble_nll(nll, starts, weights)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, naive(nll, starts, weights), rtol=1e-12)


def test_documents_start_after_their_end_of_text_token() -> None:
    assert document_starts(ROWS, END).astype(int).tolist() == [[1, 0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0]]
    assert document_starts(ROWS, None).astype(int).tolist() == [[1, 0, 0, 0, 0, 0, 0]] * 2
    assert document_starts(ROWS.astype("<u2"), END).tolist() == document_starts(ROWS, END).tolist()


def test_the_posterior_starts_anew_with_each_document() -> None:
    nll = random_nll(3, 1, 6)
    starts = ONE_DOCUMENT.copy()
    starts[0, 4] = True
    whole = ensemble_nll(nll, starts, "posterior")
    parts = [ensemble_nll(nll[..., part], ONE_DOCUMENT[:, part], "posterior") for part in (slice(4), slice(4, 6))]
    np.testing.assert_allclose(whole, np.concatenate(parts, axis=1), rtol=1e-12)
    assert whole[0, 4] == pytest.approx(ensemble_nll(nll, starts, "uniform")[0, 4])
    assert abs(whole - ensemble_nll(nll, ONE_DOCUMENT, "posterior"))[0, 4:].max() > 0.01, "the restart has an effect"


@pytest.mark.parametrize("weights", get_args(Weights))
def test_identical_members_give_the_nll_of_one(weights: Weights) -> None:
    one = random_nll(1, 2, 7)
    for members in (1, 4):
        found = ensemble_nll(np.repeat(one, members, axis=0), document_starts(ROWS, END), weights)
        np.testing.assert_allclose(found, one[0], rtol=1e-12, atol=1e-13)


def test_the_posterior_approaches_the_perfect_member() -> None:
    nll = np.stack([np.zeros((1, 2000)), np.full((1, 2000), 50.0)])  # the joint probability of the second underflows
    starts = np.zeros((1, 2000), dtype=bool)
    found = ensemble_nll(nll, starts, "posterior")[0]
    assert found[0] == pytest.approx(np.log(2)), "the weights of the first token are uniform"
    assert found[1:].max() < 1e-20
    assert ensemble_nll(nll[::-1], starts, "posterior")[0].tolist() == pytest.approx(found.tolist())
    assert ensemble_nll(nll, starts, "uniform")[0] == pytest.approx(np.full(2000, np.log(2)))


@given(st.integers(1, 4).flatmap(lambda n: arrays(np.float32, (n, 1, 6), elements=st.floats(0, 200, width=32))))
def test_the_posterior_costs_at_most_log_n_nats(nll: np.ndarray) -> None:
    found = ensemble_nll(nll, ONE_DOCUMENT, "posterior").sum()
    total = nll.astype(float).sum(axis=(1, 2))
    assert found <= total.min() + np.log(len(nll)) + 1e-9
    # The product of the tokens' probabilities is the mean of the members' probabilities of the document
    assert found == pytest.approx(-np.logaddexp.reduce(-total) + np.log(len(nll)), abs=1e-9)


def ensembles(*names: str) -> list[ModelScore]:
    members = [model_score(name, PAPER[name]) for name in names]
    nll = random_nll(len(names), 40, 16)
    starts = {domain: np.zeros((40, 16), dtype=bool) for domain in members[0].domains}
    return ensemble_scores(members, [dict.fromkeys(starts, each) for each in nll], starts, 1000, 2e9)


def test_the_scores_describe_all_members_together() -> None:
    found = ensembles("seed", "code", "law")
    assert [(model.label, model.kind) for model in found] == [
        ("ensemble posterior", "ensembles"),
        ("ensemble uniform", "ensembles"),
    ]
    assert len({model.id for model in found} | {model.id for model in ensembles("seed", "code")}) == 4
    for weights, model in zip(get_args(Weights), found, strict=True):
        assert model.parameters == model.active_parameters == 3 * 587_200_000
        assert (model.tokens, model.flops, model.lineage_tokens, model.lineage_flops) == (0, 0.0, 1000, 2e9)
        assert (model.routing, model.attention_experts) == (None, None)
        expected = naive(random_nll(3, 40, 16), np.zeros((40, 16), dtype=bool), weights).mean(axis=1)
        for score in model.domains.values():
            assert score.sequence_nll == pytest.approx(expected.tolist())
            assert score.tokens == 40 * 16
    assert found[0].perplexity(MEAN) != found[1].perplexity(MEAN)


def test_there_is_no_ensemble_without_a_branch() -> None:
    assert ensembles("seed") == []
