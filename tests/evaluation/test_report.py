from pathlib import Path

import numpy as np
import pytest

from bam_ray.checkpoint.manifest import ComputeCost, Manifest
from bam_ray.evaluation.plots import smoothed
from bam_ray.evaluation.report import format_flops, format_timestamp, format_value, render_report, write_report
from bam_ray.evaluation.results import Results
from tests.support.html_page import Page

FACTS = {"vocab_size": 8192, "domains": {"general": {"train_tokens": 1234567, "leak": 0.0123}, "code": {"leak": 0.5}}}
CURVE = [(step, 5.0 / step) for step in range(1, 30)]


def lineage(results: Results) -> list[Manifest]:
    corpus = Manifest(id="corpus-0123456789ab", kind="corpora", name="corpus", tokens=5_000_000)
    return [corpus] + [
        Manifest(
            id=model.id,
            kind=model.kind,
            name=model.name,
            parents=(corpus.id,),
            step=1250,
            tokens=2_000_000,
            compute=ComputeCost(flops=3.2e15, device_seconds=3725.0),
        )
        for model in results.models
    ]


@pytest.fixture(scope="module")
def page(paper: Results) -> Page:
    curves = {paper.models[0].id: CURVE, paper.models[4].id: CURVE}
    return Page(render_report(paper, lineage(paper), curves, FACTS, {"name": "paper", "note": "a <b> & c"}))


def test_the_page_contains_all_numbers(page: Page, paper: Results) -> None:
    text = " ".join(page.texts)
    for model in paper.models:
        assert model.label in page.texts
        for column in paper.columns:
            assert f"{model.perplexity(column):.2f}" in page.texts
            low, high = model.interval(column)
            assert f"{low:.2f} – {high:.2f}" in page.texts
    for finding in paper.findings:
        assert finding.claim in text
    assert page.texts.count("yes") == len(paper.findings)
    for shown in ("1,234,567", "0.0123", "8,192", "700M", "3.2e15", "1h 02m", "1,250", "a <b> & c"):
        assert shown in text
    assert "–" in page.texts, "the corpus has no FLOPs"
    assert page.values("class").count("best") == 5
    assert "ensembles" not in text, "there are none"


def test_the_page_is_self_contained_and_its_links_are_valid(page: Page) -> None:
    assert all(source.startswith("data:image/png;base64,") for source in page.values("src"))
    # Bars and curves, the FFN routing of three mixtures, and the attention routing of two
    assert len(page.values("src")) == 2 + 3 + 2
    assert {link.removeprefix("#") for link in page.values("href")} <= set(page.values("id"))
    assert all(page.values("alt"))


def test_a_page_without_curves_and_with_refuted_findings(paper: Results, tmp_path: Path) -> None:
    refuted = [finding.model_copy(update={"holds": False}) for finding in paper.findings]
    results = paper.model_copy(update={"models": paper.models[:2], "findings": tuple(refuted)})
    parents = lineage(results)
    write_report(tmp_path, results, parents, {}, FACTS, {})
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert page.texts.count("no") == len(refuted)
    assert "Training" not in page.texts
    assert len(page.values("src")) == 1
    assert Results.model_validate_json((tmp_path / "results.json").read_bytes()) == results
    assert render_report(results, parents, {}, FACTS, {}) == html, "concurrent writers of a report write the same bytes"


def test_smoothing_keeps_straight_lines_and_the_length() -> None:
    line = np.arange(100.0)
    assert smoothed(line) == pytest.approx(line)
    noisy = np.tile([0.0, 2.0], 50)
    assert smoothed(noisy)[10:-10] == pytest.approx(np.ones(80), abs=0.25)
    assert smoothed(np.array([3.0])).tolist() == [3.0]


def test_formats_of_values() -> None:
    assert format_flops(1.26e15) == "1.3e15"
    assert format_value({"a": 1000, "b": [0.5, None, True]}) == "a 1,000, b 0.5, –, yes"
    assert format_timestamp("2026-11-22T06:30:12+00:00") == "2026-11-22 06:30 UTC"
