"""Findings: comparisons that check the claims of the paper on the models of a run, and how much mixing has gained.

A finding states an order of perplexities. `holds` is True if the measured perplexities are in this order. `support` is
the share of bootstrap resamples that are in this order, so a finding that holds with a support of 0.6 is weak. Two
models are resampled with the same draws: the comparison is paired, and text that is hard for both models does not blur
it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bam_ray.evaluation.decomposition import gap_parts
from bam_ray.evaluation.results import MEAN, Finding, FindingKind, ModelKind, ModelScore, Results
from bam_ray.settings import PRIOR_CONTROLS, control_name


def make_results(run: str, models: Sequence[ModelScore]) -> Results:
    """Return the results of `models`, which must all be scored on the same domains."""
    domains = tuple(models[0].domains)
    assert all(tuple(model.domains) == domains for model in models)
    return Results(
        run=run,
        domains=domains,
        models=tuple(models),
        means={model.id: model.perplexity(MEAN) for model in models},
        best={column: _best(models, column).id for column in (*domains, MEAN)},
        findings=tuple(findings(models)),
        gap_parts=tuple(gap_parts(models)),
    )


def findings(models: Sequence[ModelScore]) -> Iterator[Finding]:
    """Yield the claims of the paper and the comparisons with baselines, checked on `models`.

    Claims about models that are absent are omitted.
    """
    for seed in _of_kind(models, "seeds"):
        yield from _against_seed(models, seed)
    mixtures = _of_kind(models, "mixtures")
    for control in _of_kind(models, "controls"):
        if control.name == control_name(1.0):
            yield from _against_baseline(mixtures, control, "mixture_beats_dense", "the dense control")
        elif control.name in PRIOR_CONTROLS:
            yield from _against_baseline(mixtures, control, "mixture_beats_dense_with_prior", control.label)
    for ensemble in _of_kind(models, "ensembles"):
        if ensemble.name == "posterior":
            yield from _against_baseline(mixtures, ensemble, "mixture_beats_ensemble", ensemble.label)
    for bam in (mixture for mixture in mixtures if mixture.attention_experts == "kv_experts"):
        for baseline in (mixture for mixture in mixtures if mixture.is_btx):
            yield from _against_btx(mixtures, bam, baseline)


def _against_seed(models: Sequence[ModelScore], seed: ModelScore) -> Iterator[Finding]:
    for branch in _of_kind(models, "branches"):
        if branch.name in branch.domains:
            claim = f"{branch.label} beats the seed on {branch.name}"
            yield _finding("branch_beats_seed", claim, branch.name, branch, seed)
    for mixture in _of_kind(models, "mixtures"):
        claim = f"{mixture.label} beats the seed in mean perplexity"
        yield _finding("mixture_beats_seed", claim, MEAN, mixture, seed)


def _against_baseline(
    mixtures: Sequence[ModelScore], baseline: ModelScore, about: FindingKind, name: str
) -> Iterator[Finding]:
    for mixture in mixtures:
        yield _finding(about, f"{mixture.label} beats {name} in mean perplexity", MEAN, mixture, baseline)


def _against_btx(mixtures: Sequence[ModelScore], bam: ModelScore, baseline: ModelScore) -> Iterator[Finding]:
    claim = f"{bam.label} (kv_experts) beats {baseline.label} (BTX) in mean perplexity"
    yield _finding("kv_experts_beats_btx", claim, MEAN, bam, baseline)
    for shared in (mixture for mixture in mixtures if mixture.attention_experts == "kv_shared"):
        claim = f"{shared.label} (kv_shared) is between {bam.label} (kv_experts) and {baseline.label} (BTX)"
        yield _finding("kv_shared_between", claim, MEAN, bam, shared, baseline)


def _finding(about: FindingKind, claim: str, column: str, *models: ModelScore) -> Finding:
    """Check that the perplexities of `models` are strictly increasing in the given order."""
    values = {model.label: model.perplexity(column) for model in models}
    resampled = np.stack([model.bootstrap(column) for model in models])
    increasing = np.diff(resampled, axis=0) > 0  # [models - 1, RESAMPLES]
    measured: Any = np.diff(list(values.values())) > 0
    return Finding(
        about=about,
        claim=claim,
        column=column,
        values=values,
        holds=bool(measured.all()),
        support=float(increasing.all(axis=0).mean()),
    )


def _of_kind(models: Sequence[ModelScore], kind: ModelKind) -> list[ModelScore]:
    return [model for model in models if model.kind == kind]


def _best(models: Sequence[ModelScore], column: str) -> ModelScore:
    return min(models, key=lambda model: model.perplexity(column))
