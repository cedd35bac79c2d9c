"""The report of a run: one self-contained `report.html`, and `results.json` with the same numbers as data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from bam_ray.checkpoint.manifest import Manifest, code_version
from bam_ray.evaluation.page import PAGE
from bam_ray.evaluation.plots import Curve, perplexity_bars, routing_heatmaps, training_curves
from bam_ray.evaluation.results import Results
from bam_ray.evaluation.table import number

REPORT = "report.html"
RESULTS = "results.json"


def write_report(
    folder: Path,
    results: Results,
    lineage: Sequence[Manifest],
    curves: Mapping[str, Curve],
    corpus_facts: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Write `report.html` and `results.json` into `folder`. The arguments are those of `render`."""
    (folder / RESULTS).write_text(results.model_dump_json(indent=1), encoding="utf-8")
    (folder / REPORT).write_text(render(results, lineage, curves, corpus_facts, settings), encoding="utf-8")


def render(
    results: Results,
    lineage: Sequence[Manifest],
    curves: Mapping[str, Curve],
    corpus_facts: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> str:
    """The page; the same bytes for the same arguments.

    `lineage`: manifests of the corpus and of all models, parents first. `curves`: (step, NLL) by model id; models
    without one are left out. `corpus_facts`: `Corpus.facts`. `settings`: the recipe as plain data.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(
        number=number, amount=amount, flops=flops, duration=duration, fact=fact, moment=moment, words=words
    )
    tokens = [score.tokens for score in results.models[0].domains.values()]
    routed = [
        (
            model,
            routing_heatmaps(model.routing, "ffn"),
            None if model.is_btx else routing_heatmaps(model.routing, "attention"),
        )
        for model in results.models
        if model.routing is not None
    ]
    return environment.from_string(PAGE).render(
        results=results,
        counts=" to ".join(f"{count:,}" for count in dict.fromkeys((min(tokens), max(tokens)))),
        last_made=max(manifest.created for manifest in lineage),
        version=code_version(),
        bars=perplexity_bars(results),
        curves=training_curves(results, dict(curves)) if any(curves.values()) else None,
        routed=routed,
        undecided={model.experts: math.log(model.experts) for model in results.models},
        lineage=lineage,
        corpus=CorpusFacts.of(corpus_facts),
        settings=yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True),
    )


@dataclass(frozen=True)
class CorpusFacts:
    """A corpus manifest's facts, arranged: what is known of each domain as a table, the rest as it is."""

    domains: tuple[str, ...]
    table: dict[str, tuple[Any, ...]]  # fact -> its value in each domain
    plain: dict[str, Any]

    @staticmethod
    def of(facts: Mapping[str, Any]) -> "CorpusFacts":
        """From `{"domains": {domain: {fact: value}}, fact: value}`."""
        domains: Mapping[str, Mapping[str, Any]] = facts["domains"]
        names = dict.fromkeys(name for row in domains.values() for name in row)
        table = {name: tuple(row.get(name) for row in domains.values()) for name in names}
        return CorpusFacts(tuple(domains), table, {name: value for name, value in facts.items() if name != "domains"})


def amount(count: float) -> str:
    """1234567 -> "1.23M"; 0 -> "–"."""
    if not count:
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{letter}"
    return f"{count:g}"


def flops(count: float) -> str:
    """1.234e15 -> "1.2e15"; 0 -> "–"."""
    return f"{count:.1e}".replace("e+", "e") if count else "–"


def duration(seconds: float) -> str:
    """3725 -> "1 h 02 min"; 0 -> "–"."""
    if not seconds:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def moment(iso: str) -> str:
    """2026-11-22T06:30:12+00:00 -> "2026-11-22 06:30 UTC"."""
    return f"{datetime.fromisoformat(iso).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def words(name: str) -> str:
    """held_out_tokens -> "held out tokens"."""
    return name.replace("_", " ")


def fact(value: Any) -> str:
    """A fact for people: numbers with separators, lists joined."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {fact(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(fact(part) for part in value)
    return str(value)
