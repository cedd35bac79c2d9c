"""The comparison of the models of a recipe over several training seeds.

The models of all training seeds are scored on the same held-out sequences, and are paired by label. Intervals come from
a hierarchical bootstrap: each resample draws training seeds with replacement, and then held-out sequences of each
domain with replacement, the same for all models (see `bootstrap.Resamples`). So a difference between two models does
not contain the noise that they share: text that is hard for both, and a training seed that is bad for both.

Two models are compared by their mean NLL over the domains, because differences of NLL do not depend on how hard a
domain is. In percent, a difference d is e^d - 1, the change of the geometric mean of the perplexities. The column
`mean` of the table is the arithmetic mean of the perplexities, as in the report.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import FiniteFloat

from bam_ray.errors import CheckpointError
from bam_ray.evaluation.bootstrap import Resamples, interval_95
from bam_ray.evaluation.results import MEAN, ModelKind, ModelScore, Results, model_label
from bam_ray.settings import DILOCO, PRIOR_CONTROLS, Strict, control_name

COMPARISON = "comparison.json"
PAGE = "index.html"
CLOSE_PERCENT = 5.0  # a mixture is close to a specialist if its perplexity is at most this much higher
METHODS: tuple[ModelKind, ...] = ("mixtures", "ensembles")  # the kinds of models that baselines are compared with
DENSE_LABEL = control_name(1.0)
OTHER_CONTROLS = (*PRIOR_CONTROLS, DILOCO)  # those that are no points of the dense curve
BASELINES = (DENSE_LABEL, *OTHER_CONTROLS, model_label("ensembles", "posterior"), model_label("seeds", "seed"))
ONE_SEED = (
    "There is only one training seed. The intervals cover the choice of the held-out text, and no variation over "
    "training seeds: another seed may reverse these results."
)

Verdict = Literal["ahead", "behind", "no difference shown"]


class IntervalEstimate(Strict):
    """A mean over training seeds, with its 95 % interval."""

    value: FiniteFloat
    interval: tuple[FiniteFloat, FiniteFloat]


class TrainedModel(Strict):
    """One model of one training seed."""

    training_seed: int
    id: str
    perplexity: dict[str, FiniteFloat]  # by column: the domains and their mean
    nll: FiniteFloat  # mean over the domains, in nats per token
    lineage_tokens: int
    lineage_flops: FiniteFloat


class ComparedModel(Strict):
    """The models of all training seeds that have the same label."""

    label: str
    kind: ModelKind
    perplexity: dict[str, IntervalEstimate]  # by column
    trained: tuple[TrainedModel, ...]  # one for each training seed


class Difference(Strict):
    """The difference in mean NLL between a model and another one. It is negative if the model is better."""

    model: str
    other: str
    nll: IntervalEstimate  # nats per token
    percent: IntervalEstimate  # the same as a change of perplexity
    by_seed: tuple[FiniteFloat, ...]  # nats per token, one for each training seed
    verdict: Verdict

    @property
    def same_sign(self) -> int:
        """The number of training seeds in which the better model is the one that is better in the mean."""
        return sum((each < 0) == (self.nll.value < 0) and each != 0 for each in self.by_seed)


class SpecialistGap(Strict):
    """The difference in NLL between a model and the branch of a domain, on that domain."""

    model: str
    domain: str
    percent: IntervalEstimate  # of perplexity; positive if the branch is better
    close: bool  # True if the whole interval is at most `CLOSE_PERCENT`


class DenseEquivalent(Strict):
    """The tokens after the seed with which a dense control has the mean NLL of a model.

    They follow from the two neighboring controls by linear interpolation of the NLL over the logarithm of the tokens.
    """

    model: str
    place: Literal["between", "below", "above"]  # relative to the tokens of the controls
    tokens: FiniteFloat | None  # None unless the place is "between"
    measured: tuple[int, int]  # tokens of the smallest and of the largest control
    used: int  # tokens that the model, its branches and its mixing phase were trained on
    share: FiniteFloat | None  # tokens ÷ used


class Comparison(Strict):
    """The comparison of all models of a recipe."""

    run: str
    training_seeds: tuple[int, ...]
    reports: tuple[str, ...]  # their ids, one for each training seed
    domains: tuple[str, ...]
    sequences: dict[str, int]  # held-out sequences by domain
    resamples: int
    models: tuple[ComparedModel, ...]
    differences: tuple[Difference, ...]
    gaps: tuple[SpecialistGap, ...]
    equivalents: tuple[DenseEquivalent, ...]
    statements: tuple[str, ...]  # one line for each mixture and each ensemble

    @property
    def columns(self) -> tuple[str, ...]:
        """The domains, followed by the mean."""
        return (*self.domains, MEAN)

    @property
    def limits(self) -> tuple[str, ...]:
        """The lines that say which variation the comparison does not cover; empty if it covers several seeds."""
        return (ONE_SEED,) if len(self.training_seeds) == 1 else ()


def compare(results: Mapping[int, Results], reports: Sequence[str] = ()) -> Comparison:
    """Return the comparison of the models in `results`.

    Args:
        results: The results of each training seed.
        reports: The ids of the reports that contain them.

    Raises:
        CheckpointError: The training seeds differ in their models or in their held-out sequences.
    """
    _check_same_models_and_text(results)
    seeds, first = tuple(results), next(iter(results.values()))
    scores = {model.label: [_by_label(each)[model.label] for each in results.values()] for model in first.models}
    sequences = {domain: len(score.sequence_nll) for domain, score in first.models[0].domains.items()}
    samples = _Samples(scores, Resamples(len(seeds), tuple(sequences.values())))
    models = tuple(
        ComparedModel(
            label=label,
            kind=each[0].kind,
            perplexity={column: samples.perplexity(label, column) for column in first.columns},
            trained=tuple(_trained(seed, score) for seed, score in zip(seeds, each, strict=True)),
        )
        for label, each in scores.items()
    )
    methods = [model.label for model in models if model.kind in METHODS]
    mixtures = [model.label for model in models if model.kind == "mixtures"]
    differences = tuple(
        samples.difference(label, other)
        for label in methods
        for other in (*BASELINES, *(mixtures if label in mixtures else ()))
        if other in scores and other != label
    )
    gaps = tuple(
        samples.gap(label, domain, specialist)
        for label in methods
        for domain in first.domains
        if (specialist := model_label("branches", domain)) in scores
    )
    equivalents = tuple(_dense_equivalents(models))
    return Comparison(
        run=first.run,
        training_seeds=seeds,
        reports=tuple(reports),
        domains=first.domains,
        sequences=sequences,
        resamples=samples.resamples.count,
        models=models,
        differences=differences,
        gaps=gaps,
        equivalents=equivalents,
        statements=tuple(statement(label, differences, gaps, equivalents) for label in methods),
    )


class _Samples:
    """The scores of all models, and their bootstrap resamples. K training seeds, B resamples, D domains.

    Args:
        scores: The scores of the K training seeds, by label.
        resamples: The draws, which are the same for all models.
    """

    def __init__(self, scores: Mapping[str, Sequence[ModelScore]], resamples: Resamples) -> None:
        self.resamples = resamples
        self._domains = tuple(next(iter(scores.values()))[0].domains)
        # By label: the NLL in each domain, measured [D, K] and in each resample [D, B, K]
        self._measured: dict[str, np.ndarray] = {}
        self._drawn: dict[str, np.ndarray] = {}
        for label, models in scores.items():
            by_domain = [np.array([model.domains[domain].sequence_nll for model in models]) for domain in self._domains]
            self._measured[label] = np.stack([nll.mean(axis=1) for nll in by_domain])
            self._drawn[label] = np.stack([resamples.text_means(i, nll) for i, nll in enumerate(by_domain)])

    def perplexity(self, label: str, column: str) -> IntervalEstimate:
        """Return the mean perplexity over training seeds; that of the mean is arithmetic over domains."""
        rows = slice(None) if column == MEAN else [self._domains.index(column)]
        measured = np.exp(self._measured[label][rows]).mean(axis=0)
        drawn = np.exp(self._drawn[label][rows]).mean(axis=0)
        return self._estimate(measured, drawn)

    def difference(self, label: str, other: str) -> Difference:
        """Return the paired difference in mean NLL over domains between two models."""
        by_seed = (self._measured[label] - self._measured[other]).mean(axis=0)
        nll = self._estimate(by_seed, (self._drawn[label] - self._drawn[other]).mean(axis=0))
        return Difference(
            model=label,
            other=other,
            nll=nll,
            percent=_percent(nll),
            by_seed=tuple(by_seed.tolist()),
            verdict=verdict(nll.interval, by_seed.tolist()),
        )

    def gap(self, label: str, domain: str, specialist: str) -> SpecialistGap:
        """Return the paired difference on one domain between a model and the branch of the domain."""
        row = self._domains.index(domain)
        measured, drawn = (each[label][row] - each[specialist][row] for each in (self._measured, self._drawn))
        percent = _percent(self._estimate(measured, drawn))
        return SpecialistGap(model=label, domain=domain, percent=percent, close=percent.interval[1] <= CLOSE_PERCENT)

    def _estimate(self, measured: np.ndarray, drawn: np.ndarray) -> IntervalEstimate:
        """Return the mean over training seeds of values [K] and its interval from values [B, K]."""
        return IntervalEstimate(value=float(measured.mean()), interval=interval_95(self.resamples.seed_means(drawn)))


def verdict(interval: tuple[float, float], by_seed: Sequence[float]) -> Verdict:
    """Return the verdict on differences that are negative if the model is better.

    A model is ahead or behind only if the 95 % interval excludes zero and the difference has the same sign in all
    training seeds.
    """
    low, high = interval
    if high < 0 and all(each < 0 for each in by_seed):
        return "ahead"
    if low > 0 and all(each > 0 for each in by_seed):
        return "behind"
    return "no difference shown"


def dense_equivalent(
    curve: Sequence[tuple[int, float]], nll: float
) -> tuple[Literal["between", "below", "above"], float | None]:
    """Return where the dense curve reaches `nll`: the place relative to its points, and the tokens if it is between.

    The curve is interpolated, never extrapolated. If it is not monotone, the crossing with the fewest tokens counts.

    Args:
        curve: (tokens, mean NLL) of at least two dense controls, by increasing tokens.
        nll: The mean NLL to reach, in nats per token.
    """
    if nll > curve[0][1]:
        return "below", None
    for (tokens, before), (next_tokens, after) in pairwise(curve):
        if before >= nll >= after:
            part = (before - nll) / (before - after) if before > after else 0.0
            return "between", math.exp((1 - part) * math.log(tokens) + part * math.log(next_tokens))
    return "above", None


def statement(
    label: str, differences: Sequence[Difference], gaps: Sequence[SpecialistGap], equivalents: Sequence[DenseEquivalent]
) -> str:
    """Return what the comparison shows about one model, as one line."""
    own = [each for each in differences if each.model == label]
    parts = [
        f"{each.verdict}{' of' if each.verdict == 'ahead' else ''} {each.other} ({format_difference(each)})"
        for each in own
        if each.verdict != "no difference shown"
    ]
    unclear = [each.other for each in own if each.verdict == "no difference shown"]
    if unclear:
        parts.append(f"no difference shown to {', '.join(unclear)}")
    parts += _gap_parts([gap for gap in gaps if gap.model == label])
    parts += [f"worth {format_equivalent(each)}" for each in equivalents if each.model == label]
    return f"{label}: {'; '.join(parts)}"


def _gap_parts(gaps: Sequence[SpecialistGap]) -> Iterator[str]:
    """Yield the domains on which a model is close to the specialist, behind it, and neither of them for sure."""
    behind = [gap for gap in gaps if not gap.close and gap.percent.interval[0] > 0]
    unclear = [gap for gap in gaps if not gap.close and gap not in behind]
    within = f"within {CLOSE_PERCENT:g} % of the specialist on"
    if close := [gap.domain for gap in gaps if gap.close]:
        yield f"{within} {', '.join(close)}"
    for words, group in (("behind the specialist on", behind), (f"not shown to be {within}", unclear)):
        if group:
            yield f"{words} {', '.join(f'{gap.domain} ({gap.percent.value:+.1f} %)' for gap in group)}"


def format_difference(difference: Difference) -> str:
    """Format a difference: `-12.1 %, 95 % -13.0 to -11.2, 3 of 3 seeds`."""
    seeds = len(difference.by_seed)
    return (
        f"{format_percent(difference.percent)}, {difference.same_sign} of {seeds} {'seed' if seeds == 1 else 'seeds'}"
    )


def format_percent(percent: IntervalEstimate) -> str:
    """Format a difference in percent: `-12.1 %, 95 % -13.0 to -11.2`."""
    low, high = percent.interval
    return f"{percent.value:+.1f} %, 95 % {low:+.1f} to {high:+.1f}"


def format_equivalent(equivalent: DenseEquivalent) -> str:
    """Format dense-equivalent tokens: `634,000 dense tokens, 0.38 of the tokens used`."""
    if equivalent.tokens is not None and equivalent.share is not None:
        return f"{equivalent.tokens:,.0f} dense tokens, {equivalent.share:.2f} of the tokens used"
    lowest, highest = equivalent.measured
    bound = f"less than {lowest:,}" if equivalent.place == "below" else f"more than {highest:,}"
    return f"{bound} dense tokens ({equivalent.place} the measured range)"


def _trained(seed: int, score: ModelScore) -> TrainedModel:
    return TrainedModel(
        training_seed=seed,
        id=score.id,
        perplexity={column: score.perplexity(column) for column in (*score.domains, MEAN)},
        nll=math.fsum(each.nll for each in score.domains.values()) / len(score.domains),
        lineage_tokens=score.lineage_tokens,
        lineage_flops=score.lineage_flops,
    )


def _percent(nll: IntervalEstimate) -> IntervalEstimate:
    """Return a difference in NLL as a change of perplexity in percent."""
    low, high = (100.0 * math.expm1(each) for each in nll.interval)
    return IntervalEstimate(value=100.0 * math.expm1(nll.value), interval=(low, high))


def _dense_equivalents(models: Sequence[ComparedModel]) -> Iterator[DenseEquivalent]:
    """Yield the dense-equivalent tokens of all methods; none if there are less than two controls."""
    seed_tokens = next((model.trained[0].lineage_tokens for model in models if model.kind == "seeds"), 0)

    def point(model: ComparedModel) -> tuple[int, float]:
        """Return the tokens after the seed, and the NLL over domains and training seeds."""
        nll = math.fsum(each.nll for each in model.trained) / len(model.trained)
        return model.trained[0].lineage_tokens - seed_tokens, nll

    curve = sorted(point(model) for model in models if model.kind == "controls" and model.label not in OTHER_CONTROLS)
    if len(curve) < 2:
        return
    for model in models:
        if model.kind in METHODS:
            used, nll = point(model)
            place, tokens = dense_equivalent(curve, nll)
            yield DenseEquivalent(
                model=model.label,
                place=place,
                tokens=tokens,
                measured=(curve[0][0], curve[-1][0]),
                used=used,
                share=tokens / used if tokens is not None and used else None,
            )


def _by_label(results: Results) -> dict[str, ModelScore]:
    return {model.label: model for model in results.models}


def _check_same_models_and_text(results: Mapping[int, Results]) -> None:
    """Raise `CheckpointError` if a training seed has other models, domains or held-out sequences than the first."""
    first_seed, first = next(iter(results.items()))
    labels = set(_by_label(first))
    (text, *_) = _text_sizes(first)
    for seed, other in results.items():
        different = sorted(labels ^ set(_by_label(other)))
        if different:
            lacking = first_seed if different[0] not in labels else seed
            raise CheckpointError(
                f"training seed {lacking} has no model {different[0]!r}, which another training seed has: make the "
                "reports of all training seeds with the same recipe, and wait for all branches"
            )
        if _text_sizes(other) != {text}:
            raise CheckpointError(
                f"training seeds {first_seed} and {seed} were scored on different held-out sequences: evaluate all "
                "training seeds with the same `data` and `evaluate` settings"
            )


def _text_sizes(results: Results) -> set[tuple[tuple[str, int, int], ...]]:
    """Return the domains with their numbers of sequences and tokens, once if they are the same for all models."""
    return {
        tuple((name, len(score.sequence_nll), score.tokens) for name, score in model.domains.items())
        for model in results.models
    }
