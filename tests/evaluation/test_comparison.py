"""The comparison over training seeds: intervals, pairing, verdicts, dense-equivalent tokens and the page."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bam_ray.errors import CheckpointError
from bam_ray.evaluation.bootstrap import Resamples, interval_95
from bam_ray.evaluation.comparison import Comparison, Difference
from bam_ray.evaluation.comparison_page import render_comparison, write_comparison
from bam_ray.evaluation.dense_curve import crossing
from bam_ray.evaluation.results import MEAN
from bam_ray.evaluation.samples import verdict
from bam_ray.evaluation.table import print_comparison
from tests.support.compared import LEVEL, compare, results, shifted
from tests.support.html_page import Page


def difference(comparison: Comparison, model: str, other: str) -> Difference:
    (found,) = [each for each in comparison.differences if (each.model, each.other) == (model, other)]
    return found


@pytest.fixture(scope="module")
def three() -> Comparison:
    """Return the comparison of three training seeds, in which all models vary together."""
    return compare(
        {seed: results(shifted(0.3 * seed), text=0.5) for seed in range(3)}, ["report-0", "report-1", "report-2"]
    )


def test_the_bootstrap_of_two_seeds_and_two_sequences() -> None:
    """Each extreme has one of 16 equally likely draws, so the 95 % interval reaches from the lowest to the highest."""
    draws = Resamples(2, [2])
    means = draws.seed_means(draws.text_means(0, np.array([[1.0, 2.0], [4.0, 7.0]])))
    assert interval_95(means) == (1.0, 7.0)
    expected = {1.0: 1, 1.5: 2, 2.0: 1, 2.5: 2, 3.5: 4, 4.5: 2, 4.0: 1, 5.5: 2, 7.0: 1}  # of 16 draws
    shares = {value: 16 * np.isclose(means, value).mean() for value in expected}
    assert shares == pytest.approx(expected, abs=0.4)
    again = Resamples(2, [2])
    assert (again.text_means(0, np.eye(2)) == draws.text_means(0, np.eye(2))).all(), "the draws are always the same"


def test_the_table_has_means_over_seeds_with_intervals() -> None:
    one, two = ({"seed": 1.0}, {"seed": 2.0})
    comparison = compare({0: results(one), 5: results(two)})
    estimate = comparison.models[0].perplexity[MEAN]
    assert estimate.value == pytest.approx((math.e + math.e**2) / 2)
    assert estimate.interval == pytest.approx((math.e, math.e**2)), "each seed alone is a quarter of the resamples"
    assert [each.training_seed for each in comparison.models[0].trained] == [0, 5]
    assert comparison.differences == () and comparison.statements == ()


def test_noise_that_two_models_share_cancels(three: Comparison) -> None:
    found = difference(three, "mixture bam", "dense")
    assert found.nll.value == pytest.approx(-0.1)
    assert found.nll.interval == pytest.approx((-0.1, -0.1))
    assert found.percent.value == pytest.approx(100 * (math.exp(-0.1) - 1))
    low, high = next(model for model in three.models if model.label == "dense").perplexity[MEAN].interval
    assert high > 1.5 * low, "each model alone varies with the seed and the text"


def test_ahead_needs_the_same_sign_in_all_seeds() -> None:
    def compared(last: float) -> Difference:
        changes = [-1.0, -1.0, -1.0, -1.0, last]
        runs = {k: results(shifted(0.0, bam=0.1 + change)) for k, change in enumerate(changes)}
        return difference(compare(runs), "mixture bam", "dense")

    assert compared(-0.1).verdict == "ahead"
    refused = compared(0.1)
    assert refused.nll.interval[1] < 0
    assert (refused.verdict, refused.same_sign) == ("no difference shown", 4)


@pytest.mark.parametrize(
    ("interval", "by_seed", "expected"),
    [
        ((-2.0, -1.0), [-1.0, -2.0], "ahead"),
        ((1.0, 2.0), [1.0, 2.0], "behind"),
        ((1.0, 2.0), [1.0, 0.0], "no difference shown"),
        ((-1.0, 0.0), [-1.0, -1.0], "no difference shown"),
        ((-1.0, 2.0), [1.0, 1.0], "no difference shown"),
    ],
)
def test_verdicts(interval: tuple[float, float], by_seed: list[float], expected: str) -> None:
    assert verdict(interval, by_seed) == expected


def test_statements_name_wins_and_losses(three: Comparison) -> None:
    bam, _, btx, _, posterior, _ = three.statements
    assert bam.startswith("mixture bam: ahead of dense (-9.5 %, 95 % -9.5 to -9.5, 3 of 3 seeds); ahead of seed (")
    assert "no difference shown to ensemble posterior" in bam
    assert "within 5 % of the specialist on code" in bam
    assert bam.endswith("worth 1,414 dense tokens (95 % 1,414 to 1,414), 1.41 of the tokens used")
    assert btx.startswith(
        "mixture btx: behind dense (+10.5 %, 95 % +10.5 to +10.5, 3 of 3 seeds); behind ensemble poster"
    )
    assert "behind mixture bam (+22.1 %" in btx
    assert btx.endswith("worth less than 1,000 dense tokens (below the measured range)")
    assert posterior.startswith("ensemble posterior: ahead of dense (") and "mixture" not in posterior


def test_a_gap_to_a_specialist_counts_only_if_it_is_sure() -> None:
    def line(gaps: list[float]) -> tuple[bool, str]:
        runs = {k: results(shifted(0.0, bam=0.4 + gap)) for k, gap in enumerate(gaps)}
        compared = compare(runs)
        (found,) = [each for each in compared.gaps if each.model == "mixture bam"]
        return found.close, compared.statements[0]

    assert line([0.04, 0.04])[0]
    close, text = line([0.04, 0.06])
    assert not close and "; behind the specialist on code (+5.1 %)" in text
    close, text = line([-0.1, 0.1])
    assert not close and "; not shown to be within 5 % of the specialist on code (+0.0 %)" in text


def test_one_seed_is_named_as_a_limit(three: Comparison) -> None:
    single = compare({7: results(shifted(0.0), text=0.5)}, ["report-7"])
    assert "1 of 1 seed)" in single.statements[0]
    shown = " ".join(" ".join(Page(render_comparison(single)).texts).split())
    assert "There is only one training seed." in shown
    assert "no variation over training seeds" in shown
    assert "There is only one training seed." not in render_comparison(three)
    assert single.models[0].perplexity[MEAN].interval[0] < single.models[0].perplexity[MEAN].value


def test_seeds_must_have_the_same_models() -> None:
    whole, fewer = results(shifted(0.0)), results({k: v for k, v in LEVEL.items() if k != "bam"})
    for runs, lacking in (({3: whole, 4: fewer}, 4), ({3: fewer, 4: whole}, 3)):
        with pytest.raises(CheckpointError, match=f"training seed {lacking} has no model 'mixture bam'") as caught:
            compare(runs)
        assert "\n" not in str(caught.value)


def test_seeds_must_have_the_same_held_out_text() -> None:
    with pytest.raises(CheckpointError, match="training seeds 0 and 1 were scored on different held-out sequences"):
        compare({0: results(LEVEL), 1: results(LEVEL, sequences=9)})


@pytest.mark.parametrize(
    ("nll", "expected"),
    [
        (2.5, ("between", math.sqrt(1000 * 2000))),
        (3.0, ("between", 500.0)),
        (2.4, ("between", 2000.0)),
        (2.6, ("between", 1000.0)),
        (3.1, ("below", None)),
        (2.3, ("above", None)),
    ],
)
def test_dense_equivalent_tokens(nll: float, expected: tuple[str, float | None]) -> None:
    place, tokens = crossing([(500, 3.0), (1000, 2.6), (2000, 2.4)], nll)
    assert (place, tokens) == (expected[0], pytest.approx(expected[1]))


def test_a_single_control_gives_no_equivalent() -> None:
    compared = compare({0: results({k: v for k, v in LEVEL.items() if k != "dense-2x"})})
    assert compared.equivalents == ()
    assert "worth" not in compared.statements[0]


def test_other_controls_are_no_points_of_the_curve() -> None:
    compared = compare({0: results(LEVEL | {"dense-prior-tables": 2.55, "dense-diloco": 2.65})})
    assert difference(compared, "mixture bam", "dense-prior-tables").verdict == "ahead"
    assert difference(compared, "mixture btx", "dense-prior-tables").verdict == "behind"
    assert difference(compared, "mixture btx", "dense-diloco").verdict == "behind"
    assert compared.equivalents and compared.equivalents == compare({0: results(LEVEL)}).equivalents


def test_the_page_and_the_data_have_all_numbers(three: Comparison, tmp_path: Path) -> None:
    write_comparison(tmp_path, three)
    html = (tmp_path / "index.html").read_text()
    page = Page(html)
    for model in three.models:
        assert model.label in page.texts
        for column in three.columns:
            low, high = model.perplexity[column].interval
            assert f"{model.perplexity[column].value:.2f}" in page.texts
            assert f"{low:.2f} – {high:.2f}" in page.texts
    assert set(three.statements) <= set(page.texts)
    assert {"reports/report-0", "reports/report-1", "reports/report-2"} <= set(page.texts)
    assert all(source.startswith("data:image/png;base64,") for source in page.values("src"))
    assert len(page.values("src")) == 1 and not page.values("href"), "there are no times and no parts of gaps"
    assert Comparison.model_validate_json((tmp_path / "comparison.json").read_bytes()) == three
    data = json.loads((tmp_path / "comparison.json").read_text())
    points = [(each["lineage_flops"], each["lineage_tokens"]) for model in data["models"] for each in model["trained"]]
    assert len(points) == 3 * len(LEVEL)


def test_the_comparison_is_printed(three: Comparison) -> None:
    out = io.StringIO()
    print_comparison(three, Console(file=out, width=110))
    assert "training seeds 0, 1, 2" in out.getvalue()
    assert all(line in out.getvalue() for line in three.statements)
    low, high = three.models[0].perplexity[MEAN].interval
    assert f"{low:.2f} – {high:.2f}" in out.getvalue()
