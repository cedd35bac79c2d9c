"""Make the comparison of the models of a recipe from the results of several training seeds."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from bam_ray.errors import CheckpointError
from bam_ray.evaluation.bootstrap import Resamples
from bam_ray.evaluation.comparison import (
    CLOSE_PERCENT,
    DENSE_LABEL,
    ComparedModel,
    ComparedTask,
    Comparison,
    Difference,
    GapEstimate,
    SpecialistGap,
    TrainedModel,
)
from bam_ray.evaluation.decomposition import PARTS, part_sequences, specialist_label, undecomposed
from bam_ray.evaluation.dense_curve import DenseCurve, DenseEquivalent, DenseMatch
from bam_ray.evaluation.results import MEAN, ModelKind, ModelScore, Results, model_label
from bam_ray.evaluation.samples import Samples, as_percent
from bam_ray.evaluation.statements import cost_statement, statement
from bam_ray.evaluation.wall_clock import Cluster, ModelTime, WallClock, dense_speed, model_time
from bam_ray.settings import DILOCO, PRIOR_CONTROLS, dense_multiple

METHODS: tuple[ModelKind, ...] = ("mixtures", "ensembles")  # the kinds of models that baselines are compared with
BASELINES = (
    DENSE_LABEL,
    *PRIOR_CONTROLS,
    DILOCO,
    model_label("ensembles", "posterior"),
    model_label("seeds", "seed"),
)

Scores = Mapping[str, Sequence[ModelScore]]  # the scores of the training seeds, by label


def compare(results: Mapping[int, Results], cluster: Cluster, reports: Sequence[str] = ()) -> Comparison:
    """Return the comparison of the models in `results`.

    Args:
        results: The results of each training seed.
        cluster: The cluster for the comparison in equal time.
        reports: The ids of the reports that contain them.

    Raises:
        CheckpointError: The training seeds differ in their models or in their held-out sequences.
    """
    _check_same_models_and_text(results)
    seeds, first = tuple(results), next(iter(results.values()))
    scores = {model.label: [_by_label(each)[model.label] for each in results.values()] for model in first.models}
    sequences = {domain: len(score.sequence_nll) for domain, score in first.models[0].domains.items()}
    samples = Samples(scores, Resamples(len(seeds), tuple(sequences.values())))
    methods = [label for label, each in scores.items() if each[0].kind in METHODS]
    differences = tuple(_differences(scores, methods, samples))
    gaps = tuple(
        _gap(label, domain, specialist, samples)
        for label in methods
        for domain in first.domains
        if (specialist := model_label("branches", domain)) in scores
    )
    at_cost = _AtEqualCost(scores, methods, samples, cluster)
    return Comparison(
        run=first.run,
        training_seeds=seeds,
        reports=tuple(reports),
        domains=first.domains,
        sequences=sequences,
        resamples=samples.resamples.count,
        models=tuple(
            ComparedModel(
                label=label,
                kind=each[0].kind,
                perplexity={column: samples.perplexity(label, column) for column in first.columns},
                trained=tuple(_trained(seed, score) for seed, score in zip(seeds, each, strict=True)),
                serving=each[0].serving,
                lm_eval=tuple(_tasks(each)),
            )
            for label, each in scores.items()
        ),
        differences=differences,
        gaps=gaps,
        gap_parts=tuple(_gap_estimates(scores, samples)),
        undecomposed=tuple(undecomposed(first.models)),
        equivalents=at_cost.equivalents,
        matches=at_cost.matches,
        clock=at_cost.clock,
        statements=tuple(
            line
            for label in methods
            for line in (statement(label, differences, gaps, at_cost.equivalents), *at_cost.statements(label))
        ),
    )


def _differences(scores: Scores, methods: Sequence[str], samples: Samples) -> Iterator[Difference]:
    """Yield the differences between the methods and the baselines, and between each two mixtures."""
    mixtures = [label for label in methods if scores[label][0].kind == "mixtures"]
    for label in methods:
        for other in (*BASELINES, *(mixtures if label in mixtures else ())):
            if other in scores and other != label:
                difference = samples.difference(samples.nll(label) - samples.nll(other))
                yield Difference(model=label, other=other, **difference)


def _gap(label: str, domain: str, specialist: str, samples: Samples) -> SpecialistGap:
    """Return the paired difference on one domain between a model and the branch of the domain."""
    percent = as_percent(samples.estimate(samples.nll(label, domain) - samples.nll(specialist, domain)))
    return SpecialistGap(model=label, domain=domain, percent=percent, close=percent.interval[1] <= CLOSE_PERCENT)


def _gap_estimates(scores: Scores, samples: Samples) -> Iterator[GapEstimate]:
    """Yield the parts of the gap of each mixture, on the domains that have an expert in all training seeds."""
    for label, models in scores.items():
        for domain, oracle in models[0].oracle.items():
            specialist = specialist_label(oracle.expert)
            if specialist not in scores or not all(domain in model.oracle for model in models):
                continue
            by_seed = [part_sequences(model, domain, of) for model, of in zip(models, scores[specialist], strict=True)]
            parts = {
                part: samples.estimate(samples.of_sequences(domain, np.stack([each[part] for each in by_seed])))
                for part in PARTS
            }
            yield GapEstimate(model=label, domain=domain, specialist=specialist, **parts)


class _AtEqualCost:
    """The comparison of the methods with dense controls that cost as much: tokens, FLOPs or time.

    Costs do not contain those of the seed, which all models share. Everything is empty without a dense control.
    """

    def __init__(self, scores: Scores, methods: Sequence[str], samples: Samples, cluster: Cluster) -> None:
        self._scores, self._samples, self._cluster = scores, samples, cluster
        multiples = {
            label: multiple
            for label, each in scores.items()
            if each[0].kind == "controls" and (multiple := dense_multiple(each[0].name)) is not None
        }
        self.equivalents: tuple[DenseEquivalent, ...] = ()
        self.matches: tuple[DenseMatch, ...] = ()
        self.clock: WallClock | None = None
        if not multiples:
            return
        points = [(self._tokens(label), samples.nll(label)) for label in multiples]
        self._curve = DenseCurve(points, max(multiples.values()))
        found = {
            label: self._curve.equivalent(label, samples.nll(label), self._tokens(label), samples) for label in methods
        }
        # A single control is a bound at most
        self.equivalents = tuple(found.values()) if len(multiples) > 1 else ()
        self.clock = self._wall_clock(multiples, found)
        largest = max(multiples, key=multiples.__getitem__)
        self._flops_per_token = self._flops(largest) / self._tokens(largest)
        self.matches = tuple(match for label in methods for match in self._matches(label))

    def statements(self, label: str) -> list[str]:
        """Return the line about a method; empty without a dense control."""
        matches = [match for match in self.matches if match.model == label]
        return [cost_statement(label, matches, self._cluster)] if matches else []

    def _matches(self, label: str) -> Iterator[DenseMatch]:
        """Yield the comparisons of a method at each equal cost."""
        costs: dict[str, float] = {"tokens": self._tokens(label)}
        if self._flops_per_token and self._flops(label):
            costs["FLOPs"] = self._flops(label) / self._flops_per_token
        if self.clock is not None:
            for time in self.clock.models:
                costs |= self.clock.dense_tokens(time) if time.model == label else {}
        for cost, tokens in costs.items():
            if tokens:
                yield self._curve.match(label, self._samples.nll(label), cost, tokens, self._samples)

    def _wall_clock(self, controls: Iterable[str], found: Mapping[str, DenseEquivalent]) -> WallClock | None:
        """Return the times of the methods in `found`; None if the time of a dense control is not known."""
        dense = dense_speed([model for label in controls for model in self._scores[label]], self._cluster)
        if dense is None:
            return None
        times: list[ModelTime] = []
        for label, equivalent in found.items():
            models = self._scores[label]
            labels = [model_label("branches", name) for name in models[0].branches]
            if not all(each in self._scores for each in labels):  # a branch that was damaged later is not scored
                continue
            branches = [self._scores[each] for each in labels]
            interval = None if equivalent.tokens is None else equivalent.interval
            time = model_time(models, branches, dense, self._cluster, equivalent.tokens, interval)
            times += [time] if time is not None else []
        return WallClock(cluster=self._cluster, dense=dense, models=tuple(times))

    def _tokens(self, label: str) -> int:
        """Return the tokens that a model and what it was made from were trained on after the seed."""
        return self._scores[label][0].lineage_tokens - sum(model.lineage_tokens for model in self._seed)

    def _flops(self, label: str) -> float:
        """Return the FLOPs of a model and of what it was made from, after the seed."""
        return self._scores[label][0].lineage_flops - sum(model.lineage_flops for model in self._seed)

    @property
    def _seed(self) -> Sequence[ModelScore]:
        """The seed of the first training seed; empty without one."""
        return self._scores.get(model_label("seeds", "seed"), ())[:1]


def _trained(seed: int, score: ModelScore) -> TrainedModel:
    return TrainedModel(
        training_seed=seed,
        id=score.id,
        perplexity={column: score.perplexity(column) for column in (*score.domains, MEAN)},
        nll=math.fsum(each.nll for each in score.domains.values()) / len(score.domains),
        lineage_tokens=score.lineage_tokens,
        lineage_flops=score.lineage_flops,
    )


def _tasks(models: Sequence[ModelScore]) -> Iterator[ComparedTask]:
    """Yield the metrics that a model has in all training seeds."""
    by_seed = [{(score.task, score.metric): score.value for score in model.lm_eval} for model in models]
    for task, metric in by_seed[0]:
        if all((task, metric) in values for values in by_seed):
            values = tuple(values[task, metric] for values in by_seed)
            yield ComparedTask(task=task, metric=metric, mean=math.fsum(values) / len(values), by_seed=values)


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
