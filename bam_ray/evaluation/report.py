"""The report of a run: one self-contained `report.html`, and `results.json` with the same numbers as data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from bam_ray.checkpoint.manifest import Manifest, code_version
from bam_ray.evaluation.decomposition import undecomposed
from bam_ray.evaluation.page import PAGE
from bam_ray.evaluation.plots import Curve, Picture, perplexity_bars, routing_heatmaps, training_curves
from bam_ray.evaluation.results import ModelScore, Results
from bam_ray.evaluation.table import format_perplexity
from bam_ray.units import format_count, format_duration

REPORT = "report.html"
RESULTS = "results.json"
NO_VALUE = "–"  # shown in place of a number that is zero or unknown


def write_report(
    folder: Path,
    results: Results,
    lineage: Sequence[Manifest],
    curves: Mapping[str, Curve],
    corpus_facts: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Write `report.html` and `results.json` to `folder`. The arguments are those of `render_report`."""
    (folder / RESULTS).write_text(results.model_dump_json(indent=1), encoding="utf-8")
    html = render_report(results, lineage, curves, corpus_facts, settings)
    (folder / REPORT).write_text(html, encoding="utf-8")


def render_report(
    results: Results,
    lineage: Sequence[Manifest],
    curves: Mapping[str, Curve],
    corpus_facts: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> str:
    """Return the HTML page. Equal arguments give equal bytes.

    Args:
        results: The results of all models.
        lineage: The manifests of the corpus and of all models, parents first.
        curves: (step, NLL) by model id. Models without a curve are omitted.
        corpus_facts: The facts of the corpus, `Corpus.facts`.
        settings: The recipe as plain data.
    """
    tokens = [score.tokens for score in results.models[0].domains.values()]
    return page_template(PAGE).render(
        title=f"{results.run}: report",
        results=results,
        token_counts=" to ".join(f"{count:,}" for count in dict.fromkeys((min(tokens), max(tokens)))),
        last_created=max(manifest.created for manifest in lineage),
        version=code_version(),
        undecomposed=undecomposed(results.models),
        bars=perplexity_bars(results),
        curves=training_curves(results, dict(curves)) if any(curves.values()) else None,
        routed=[_heatmaps(model) for model in results.models if model.routing is not None],
        uniform_entropy={model.experts: math.log(model.experts) for model in results.models},
        lineage=lineage,
        corpus=CorpusSummary.from_facts(corpus_facts),
        settings=yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True),
    )


def page_template(source: str, filters: Mapping[str, Callable[..., str]] | None = None) -> jinja2.Template:
    """Return the template of a page with the filters that format numbers, and with `filters`."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(
        perplexity=format_perplexity,
        number=_dash_if_zero(format_count),
        flops=_dash_if_zero(format_flops),
        duration=_dash_if_zero(format_duration),
        value=format_value,
        timestamp=format_timestamp,
        words=format_name,
        **(filters or {}),
    )
    return environment.from_string(source)


@dataclass(frozen=True)
class CorpusSummary:
    """The facts of a corpus manifest: a table of the facts of each domain, and the facts of the whole corpus."""

    domains: tuple[str, ...]
    by_domain: dict[str, tuple[Any, ...]]  # fact -> its value in each domain
    overall: dict[str, Any]

    @staticmethod
    def from_facts(facts: Mapping[str, Any]) -> "CorpusSummary":
        """Arrange `{"domains": {domain: {fact: value}}, fact: value}`."""
        domains: Mapping[str, Mapping[str, Any]] = facts["domains"]
        names = dict.fromkeys(name for row in domains.values() for name in row)
        by_domain = {name: tuple(row.get(name) for row in domains.values()) for name in names}
        overall = {name: value for name, value in facts.items() if name != "domains"}
        return CorpusSummary(tuple(domains), by_domain, overall)


def format_flops(number: float) -> str:
    """Format a number of FLOPs with two digits: `1.2e15`."""
    return f"{number:.1e}".replace("e+", "e")


def format_timestamp(iso: str) -> str:
    """Format a timestamp: `2026-11-22T06:30:12+00:00` becomes `2026-11-22 06:30 UTC`."""
    return f"{datetime.fromisoformat(iso).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def format_name(name: str) -> str:
    """Format the name of a fact: `held_out_tokens` becomes `held out tokens`."""
    return name.replace("_", " ")


def format_value(value: Any) -> str:
    """Format the value of a fact: numbers with thousands separators, lists and mappings joined by commas."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NO_VALUE}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {format_value(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(format_value(part) for part in value)
    return str(value)


def _dash_if_zero(format_number: Callable[[float], str]) -> Callable[[float], str]:
    return lambda number: format_number(number) if number else NO_VALUE


def _heatmaps(model: ModelScore) -> tuple[ModelScore, Picture, Picture | None]:
    """Return a mixture with the figures of its FFN routing and, if it has attention experts, of its attention gates."""
    assert model.routing is not None
    attention = None if model.is_btx else routing_heatmaps(model.routing, "attention")
    return model, routing_heatmaps(model.routing, "ffn"), attention
