"""The results of the evaluation of adapters as data and as a table.

The unit is a held-out document. All models read the same documents, so their differences are paired. The mean of a
column weights topics by their scored tokens: it is the exponential of the mean NLL of all scored tokens. Intervals
come from a bootstrap over the documents. They cover the choice of the held-out text only, not the variation that
another training seed would cause.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import FiniteFloat
from rich.console import Console
from rich.table import Table

from bam_ray.evaluation.bootstrap import bootstrap_means, interval_95
from bam_ray.evaluation.samples import IntervalEstimate
from bam_ray.evaluation.table import format_perplexity
from bam_ray.settings import Strict

RESULTS = "results.json"
BASE, OWN, AUTO, SHORT, RANDOM, ALL_TEXT = "base", "own", "auto", "auto_short", "random", "all_text"
TOPICS_SHOWN = 40


class TopicResult(Strict):
    """The held-out perplexity of each model on one topic.

    Attributes:
        name: The name of the topic.
        terms: Its characteristic words.
        documents: The number of scored documents.
        tokens: The number of scored tokens.
        perplexity: The perplexity of each model.
    """

    name: str
    terms: tuple[str, ...]
    documents: int
    tokens: int
    perplexity: dict[str, IntervalEstimate]


class AdapterResults(Strict):
    """The results of a run with adapters.

    Attributes:
        run: The name of the run.
        models: The scored models: the base model, the own adapter of the topic, those that the server chooses, and the
            controls.
        labels: The description of each model.
        mean: The perplexity of each model on all scored tokens.
        ratios: The perplexity of the own adapters over that of each other model; below 1 means that they are better.
        routing: The fraction of documents for which the adapter of their own topic is chosen, by model.
        far: The fraction of documents for which the base model is chosen, by model.
        topics: The topics with held-out documents, the largest first.
    """

    run: str
    models: tuple[str, ...]
    labels: dict[str, str]
    mean: dict[str, IntervalEstimate]
    ratios: dict[str, IntervalEstimate]
    routing: dict[str, FiniteFloat]
    far: dict[str, FiniteFloat]
    topics: tuple[TopicResult, ...]


class ScoredDocuments(NamedTuple):
    """The scores of held-out documents.

    Attributes:
        topics: The topic of each document, [n].
        tokens: The number of predicted tokens of each document, [n].
        nll: The sum of their NLLs in nats for each model, each [n].
        chosen: The topic that is chosen for each document, [n], -1 for the base model, for each model that chooses.
    """

    topics: np.ndarray
    tokens: np.ndarray
    nll: Mapping[str, np.ndarray]
    chosen: Mapping[str, np.ndarray]


def adapter_results(
    run: str, labels: Mapping[str, str], topics: Sequence[tuple[str, tuple[str, ...]]], scored: ScoredDocuments
) -> AdapterResults:
    """Return the results for scored documents.

    Args:
        run: The name of the run.
        labels: The description of each model.
        topics: The name and the terms of each topic.
        scored: The scores. There is at least one document.
    """
    models = tuple(scored.nll)
    sums = np.stack(list(scored.nll.values()), axis=1)
    own, draws = models.index(OWN), bootstrap_means(sums, scored.tokens)
    means = sums.sum(axis=0) / scored.tokens.sum()
    ratio = means[own] - means, draws[:, own, None] - draws
    found = []
    for number, (name, terms) in enumerate(topics):
        (documents,) = np.nonzero(scored.topics == number)
        if len(documents):
            tokens = scored.tokens[documents]
            mean = sums[documents].sum(axis=0) / tokens.sum()
            perplexity = _estimates(models, mean, bootstrap_means(sums[documents], tokens))
            found.append(
                TopicResult(
                    name=name, terms=terms, documents=len(documents), tokens=int(tokens.sum()), perplexity=perplexity
                )
            )
    return AdapterResults(
        run=run,
        models=models,
        labels=dict(labels),
        mean=_estimates(models, means, draws),
        ratios={model: each for model, each in _estimates(models, *ratio).items() if model != OWN},
        routing={model: float(np.mean(each == scored.topics)) for model, each in scored.chosen.items()},
        far={model: float(np.mean(each < 0)) for model, each in scored.chosen.items()},
        topics=tuple(found),
    )


def _estimates(models: Sequence[str], nll: np.ndarray, draws: np.ndarray) -> dict[str, IntervalEstimate]:
    """Return the exponentials of `nll` [k], and their intervals from `draws` [B, k], by model."""
    return {
        model: IntervalEstimate(value=float(np.exp(nll[index])), interval=interval_95(np.exp(draws[:, index])))
        for index, model in enumerate(models)
    }


def print_adapter_results(results: AdapterResults, console: Console) -> None:
    """Print the perplexities of the topics, the means with intervals, and how often the own topic is chosen."""
    topics = Table(title=f"Held-out perplexity of {results.run} by topic", caption="lower is better")
    for column in ("topic", "terms"):
        topics.add_column(column, no_wrap=True)
    for column in ("tokens", *results.models):
        topics.add_column(column, justify="right")
    for topic in results.topics[:TOPICS_SHOWN]:
        values = (format_perplexity(topic.perplexity[model].value) for model in results.models)
        topics.add_row(topic.name, " ".join(topic.terms[:3]), f"{topic.tokens:,}", *values)
    console.print(topics)
    if len(results.topics) > TOPICS_SHOWN:
        console.print(f"{len(results.topics) - TOPICS_SHOWN} smaller topics are in {RESULTS}")
    means = Table(title="All topics, weighted by tokens", caption="95 % intervals from a bootstrap over documents")
    means.add_column("model", no_wrap=True)
    for column in ("perplexity", "95 %", "own / model", "95 %", "own topic", "no adapter"):
        means.add_column(column, justify="right", no_wrap=True)
    for model in results.models:
        value, ratio = results.mean[model], results.ratios.get(model)
        low, high = map(format_perplexity, value.interval)
        cells = [model, format_perplexity(value.value), f"{low} – {high}"]
        cells += [f"{ratio.value:.3f}", "{:.3f} – {:.3f}".format(*ratio.interval)] if ratio else ["", ""]
        if model in results.routing:
            cells += [f"{results.routing[model]:.1%}", f"{results.far[model]:.1%}"]
        means.add_row(*cells)
    console.print(means)
    for model in results.models:
        console.print(f"{model}: {results.labels[model]}", soft_wrap=True)
