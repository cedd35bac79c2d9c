import io

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from bam_ray.evaluation.findings import make_results
from bam_ray.evaluation.results import MEAN, DomainScore, Finding, ModelScore, Results
from bam_ray.evaluation.table import format_finding, format_findings, format_perplexity, perplexity_table
from tests.support.paper_table import DOMAINS, PAPER, model_score


def finding(results: Results, about: str, label: str = "") -> Finding:
    return next(each for each in results.findings if each.about == about and label in each.claim)


def test_means_and_best_models_of_the_paper(paper: Results) -> None:
    assert round(paper.means["seed-0123456789ab"], 2) == 13.91
    assert round(paper.means["btx-0123456789ab"], 2) == 10.72 + 0.01  # 10.725 of the rounded columns
    assert {column: id.split("-")[0] for column, id in paper.best.items()} == {
        "general": "seed",
        "code": "bam",
        "law": "bam",
        "math": "bam",
        "mean": "bam",
    }


def test_the_claims_of_the_paper_hold_in_its_table(paper: Results) -> None:
    assert [each.about for each in paper.findings] == (
        ["branch_beats_seed"] * 3 + ["mixture_beats_seed"] * 3 + ["kv_experts_beats_btx", "kv_shared_between"]
    )
    assert all(each.holds and each.support > 0.99 for each in paper.findings)
    own = finding(paper, "branch_beats_seed", "code")
    assert own.values == {"branch code": pytest.approx(3.71), "seed": pytest.approx(8.62)}
    between = finding(paper, "kv_shared_between")
    assert list(between.values) == ["mixture bam", "mixture shared", "mixture btx"]


def test_refuted_claims_are_reported(paper: Results) -> None:
    rows = dict(PAPER)
    rows["law"] = PAPER["seed"]  # a branch that equals the seed does not beat it
    rows["bam"], rows["btx"] = PAPER["btx"], PAPER["bam"]
    rows["shared"] = tuple(2 * value for value in PAPER["seed"])
    worse = make_results("worse", [model_score(name, row) for name, row in rows.items()])
    assert finding(worse, "branch_beats_seed", "code").holds
    for about, label in (
        ("branch_beats_seed", "law"),
        ("mixture_beats_seed", "shared"),
        ("kv_experts_beats_btx", ""),
        ("kv_shared_between", ""),
    ):
        assert not finding(worse, about, label).holds
        assert finding(worse, about, label).support == 0.0
    lines = format_findings(worse).splitlines()
    assert len(lines) == len(worse.findings)
    assert lines[0] == "yes  branch code beats the seed on code: 3.71 against 8.62 (in 100% of resamples)"
    assert lines[1] == "no   branch law beats the seed on law: 8.92 against 8.92 (in 0% of resamples)"


def test_each_mixture_is_compared_with_the_posterior() -> None:
    ensembles = [
        model_score(name, tuple(factor * value for value in PAPER["btx"])).model_copy(
            update={"name": name, "kind": "ensembles", "attention_experts": None, "routing": None}
        )
        for name, factor in (("posterior", 0.99), ("uniform", 0.5))
    ]
    results = make_results(
        "ensembles", [*(model_score(name, PAPER[name]) for name in ("seed", "btx", "bam")), *ensembles]
    )
    compared = [each for each in results.findings if each.about == "mixture_beats_ensemble"]
    assert [(each.claim, each.holds, each.column) for each in compared] == [
        ("mixture btx beats ensemble posterior in mean perplexity", False, MEAN),
        ("mixture bam beats ensemble posterior in mean perplexity", True, MEAN),
    ]
    assert "no   mixture btx beats ensemble posterior in mean perplexity: 10.73 against 10.62" in format_findings(
        results
    )
    assert "ensemble posterior" in [str(cell) for cell in perplexity_table(results).columns[0].cells]


def test_a_finding_that_may_be_chance_has_no_verdict() -> None:
    results = make_results("demo", [model_score(name, PAPER[name]) for name in ("seed", "btx", "bam")])
    sure = finding(results, "mixture_beats_seed", "btx")
    assert (sure.verdict, sure.model_copy(update={"holds": False, "support": 0.02}).verdict) == ("yes", "no")
    unsure = sure.model_copy(update={"support": 0.49})
    assert unsure.verdict == "?"
    assert format_finding(unsure).startswith("?    mixture btx beats the seed")


def test_every_mixture_is_compared_with_the_dense_control() -> None:
    def control(name: str, row: tuple[float, ...]) -> ModelScore:
        return model_score(name, row).model_copy(update={"kind": "controls"})

    rows = [model_score(name, PAPER[name]) for name in ("seed", "bam", "btx")]
    rows += [control("dense-2x", PAPER["bam"]), control("dense", PAPER["shared"])]
    rows.append(control("dense-prior-vectors", PAPER["btx"]))
    results = make_results("controls", rows)
    claims = [each for each in results.findings if each.about == "mixture_beats_dense"]
    assert [(each.claim, each.holds, each.support) for each in claims] == [
        ("mixture bam beats the dense control in mean perplexity", True, 1.0),
        ("mixture btx beats the dense control in mean perplexity", False, 0.0),
    ]
    with_prior = [each for each in results.findings if each.about == "mixture_beats_dense_with_prior"]
    assert [(each.claim, each.holds) for each in with_prior] == [
        ("mixture bam beats dense-prior-vectors in mean perplexity", True),
        ("mixture btx beats dense-prior-vectors in mean perplexity", False),
    ]
    assert list(claims[0].values) == ["mixture bam", "dense"], "only the control on the same tokens counts"
    assert "no   mixture btx beats the dense control in mean perplexity: 10.73 against 10.32" in format_findings(
        results
    )
    out = io.StringIO()
    Console(file=out, width=120).print(perplexity_table(results))
    assert "dense-2x" in out.getvalue()


def test_a_difference_within_the_noise_has_medium_support() -> None:
    rng = np.random.default_rng(0)

    def noisy(name: str, perplexity: float) -> DomainScore:
        return DomainScore.from_sequence_nll((np.log(perplexity) + rng.normal(0, 0.3, 40)).tolist(), 640)

    models = []
    for name in ("seed", "bam"):
        model = model_score(name, PAPER["seed"])
        models.append(model.model_copy(update={"domains": {domain: noisy(name, 10.0) for domain in DOMAINS}}))
    assert 0.02 < make_results("noise", models).findings[0].support < 0.98


def test_claims_about_absent_models_are_omitted() -> None:
    only = make_results("dense", [model_score(name, PAPER[name]) for name in ("seed", "code")])
    assert [each.about for each in only.findings] == ["branch_beats_seed"]


def test_intervals_reflect_the_spread_of_the_sequences(paper: Results) -> None:
    seed = paper.models[0]
    for column in paper.columns:
        low, high = seed.interval(column)
        assert low < seed.perplexity(column) < high
    certain = DomainScore.from_sequence_nll([2.0] * 8, 64)
    assert certain.interval == pytest.approx((certain.perplexity, certain.perplexity))
    widths = [high - low for low, high in (seed.interval(column) for column in ("general", MEAN))]
    assert widths[1] < widths[0], "a mean over four domains is more certain than one domain"


def test_results_survive_json_and_reject_unknown_keys(paper: Results) -> None:
    assert Results.model_validate_json(paper.model_dump_json()) == paper
    with pytest.raises(ValidationError, match="surprise"):
        Results.model_validate({**paper.model_dump(), "surprise": 1})


def test_the_table_highlights_the_best_models(paper: Results) -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=120, color_system="standard").print(perplexity_table(paper))
    text = out.getvalue()
    bold = [part.split("\x1b[0m")[0].strip() for part in text.split("\x1b[1m")[1:]]
    assert {"23.98", "3.45", "6.04", "5.31", "9.71"} <= set(bold)
    assert "26.72" in text
    assert "26.72" not in bold


def test_perplexities_keep_three_or_more_digits() -> None:
    assert [format_perplexity(value) for value in (3.456, 99.99, 123.45, 54321.0)] == [
        "3.46",
        "99.99",
        "123.5",
        "54,321",
    ]
