"""Evaluate the adapters of a run and their controls on held-out documents of each topic.

A document is scored on its first tokens, at most as many as a row of the corpus has, and reads no other document. Its
own topic is the nearest one of its first `topics.prefix_tokens` tokens, in the same way as in training. `auto` chooses
by the same tokens, so it differs from the own topic only for documents below the threshold. `auto_short` chooses by a
quarter of them.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from bam_ray.adapters.bundles import AdapterIndex
from bam_ray.adapters.embedders import embedder_of
from bam_ray.adapters.find_topics import TOKENS_PER_PREFIX_TOKEN
from bam_ray.adapters.lora import LoraModel
from bam_ray.adapters.run_adapters import base_identity
from bam_ray.adapters.topics import ASSIGNMENTS_FILE, Topics
from bam_ray.checkpoint.manifest import ArtifactKind, ComputeCost, Manifest
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.data import Corpus
from bam_ray.data.corpus_documents import CorpusDocuments
from bam_ray.errors import DataError, Interrupted
from bam_ray.evaluation.adapter_results import (
    ALL_TEXT,
    AUTO,
    BASE,
    OWN,
    RANDOM,
    RESULTS,
    SHORT,
    ScoredDocuments,
    adapter_results,
)
from bam_ray.evaluation.perplexity import score
from bam_ray.model.loading import load_folder
from bam_ray.pipeline.tasks import Progress
from bam_ray.settings import ALL_TEXT as ALL_TEXT_ADAPTER
from bam_ray.stages.adapter_work import random_name
from bam_ray.stages.task_run import TaskRun
from bam_ray.training.devices import inference_dtype, requested_device

SHORT_PREFIX = 4  # `auto_short` reads this fraction of the prefix
DOCUMENTS_AT_ONCE = 1024  # that are embedded
SCORED_AT_ONCE = 64  # documents of similar lengths


@dataclass(frozen=True)
class HeldOutDocuments:
    """Held-out documents of topics.

    Attributes:
        rows: The first tokens of each document, filled with end-of-text tokens, [n, L].
        tokens: The number of tokens of each that are predicted, [n].
        topics: The topic of each, [n].
        texts: The beginning of each, for the embedder.
    """

    rows: np.ndarray
    tokens: np.ndarray
    topics: np.ndarray
    texts: list[str]


def evaluate_adapters(run: TaskRun) -> Manifest:
    """Score the base model, the adapters and the controls on each topic, and publish the results.

    Raises:
        DataError: There is no held-out document.
        Interrupted: The context asks to stop.
    """
    started = time.perf_counter()
    settings, lease = run.recipe.adapters, run.take_lease()
    assert settings is not None
    corpus = Corpus(run.parent(ArtifactKind.CORPORA, "corpus").fetch())
    topics_folder = run.parent(ArtifactKind.TOPICS, "topics").fetch()
    seed_folder = run.parent(ArtifactKind.SEEDS, "seed").fetch()
    topics = Topics.load(topics_folder)
    prefix = topics.embedder.prefix_tokens
    documents = held_out_documents(corpus, topics_folder, settings.held_out_tokens, prefix * TOKENS_PER_PREFIX_TOKEN)
    prefixes = {AUTO: prefix, SHORT: max(1, prefix // SHORT_PREFIX)}
    chosen = {
        name: _chosen(topics, topics_folder, seed_folder, documents.texts, tokens) for name, tokens in prefixes.items()
    }
    scorer = _Scorer(run, documents, seed_folder)
    labels = {BASE: "the seed without adapters", OWN: "the adapter of the topic of the document"}
    labels |= {name: f"the adapter that the first {tokens} tokens choose" for name, tokens in prefixes.items()}
    if settings.random_tasks:
        labels[RANDOM] = "an adapter of random documents"
    if settings.all_text_task is not None:
        labels[ALL_TEXT] = "one adapter of all text, same total tokens"
    nll = _score_models(scorer, list(labels), topics.names, documents.topics, chosen)
    results = adapter_results(
        run.recipe.name,
        labels,
        [(topic.name, topic.terms) for topic in topics.topics],
        ScoredDocuments(documents.topics, documents.tokens, nll, chosen),
    )
    with scratch_folder("adapters") as folder:
        (folder / RESULTS).write_text(results.model_dump_json(indent=1))
        wall = time.perf_counter() - started
        manifest = Manifest(
            id=run.task.id,
            kind=run.task.kind,
            name=run.task.name,
            parents=run.task.parents,
            settings={"held_out_tokens": settings.held_out_tokens, "dtype": run.recipe.evaluate.dtype},
            compute=ComputeCost(device_seconds=wall, wall_seconds=wall),
            metrics={f"perplexity/{model}": each.value for model, each in results.mean.items()}
            | {f"routing/{model}": each for model, each in results.routing.items()},
            attempt=str(lease.number),
        )
        return run.artifact.publish(folder, manifest, lease)


def _score_models(
    scorer: "_Scorer", models: list[str], names: Sequence[str], own: np.ndarray, chosen: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the sum of the NLLs of each document with each model, each [n]; an adapter is loaded once.

    Args:
        scorer: The scorer of the documents.
        models: The names of the models.
        names: The names of the topics.
        own: The topic of each document, [n].
        chosen: The topic that is chosen for each document, [n], for each model that chooses.
    """
    base = scorer.nll(np.arange(len(own)))
    nll = {model: base.copy() for model in models}
    for number, name in enumerate(names):
        users = {OWN: own == number, **{model: each == number for model, each in chosen.items()}}
        (needed,) = np.nonzero(np.any(list(users.values()), axis=0))
        scored = np.zeros_like(base)
        scored[needed] = scorer.nll(needed, name)
        for model, is_user in users.items():
            nll[model][is_user] = scored[is_user]
        if RANDOM in nll:
            (needed,) = np.nonzero(own == number)
            nll[RANDOM][needed] = scorer.nll(needed, random_name(number))
    if ALL_TEXT in nll:
        nll[ALL_TEXT] = scorer.nll(np.arange(len(own)), ALL_TEXT_ADAPTER)
    return nll


def held_out_documents(corpus: Corpus, topics_folder: Path, tokens: int, text_tokens: int) -> HeldOutDocuments:
    """Return held-out documents of each topic, in a random order that is always the same.

    Args:
        corpus: The corpus.
        topics_folder: The folder of the artifact of the topics.
        tokens: Documents of a topic are taken until they have as many tokens.
        text_tokens: The number of tokens of each document that are returned as text.

    Raises:
        DataError: There is no held-out document.
    """
    stored, length = load_file(topics_folder / ASSIGNMENTS_FILE), corpus.sequence_length
    parts = {domain: CorpusDocuments(corpus, domain, held_out=True) for domain in corpus.domains}
    places = [(domain, index) for domain, part in parts.items() for index in range(len(part))]
    lengths = np.concatenate([np.minimum(part.lengths, length) for part in parts.values()])
    topics = np.concatenate([stored[f"{domain}/held_out"] for domain in parts])
    taken: dict[int, int] = {}
    chosen: list[int] = []
    for place in np.random.default_rng(0).permutation(len(places)).tolist():
        topic = int(topics[place])
        if lengths[place] > 1 and topic >= 0 and taken.get(topic, 0) < tokens:
            taken[topic] = taken.get(topic, 0) + int(lengths[place]) - 1
            chosen.append(place)
    if not chosen:
        raise DataError("no topic has held-out documents: increase data.held_out_fraction")
    rows = np.full((len(chosen), length), corpus.end_of_text_id)
    texts: list[str] = []
    for row, place in zip(rows, chosen, strict=True):
        domain, index = places[place]
        row[: lengths[place]] = parts[domain].tokens(index, length)
        texts += parts[domain].texts([index], text_tokens)
    return HeldOutDocuments(rows, lengths[chosen] - 1, topics[chosen], texts)


def _chosen(topics: Topics, folder: Path, seed: Path, texts: list[str], prefix_tokens: int) -> np.ndarray:
    """Return the topic that the server chooses for each text by its first tokens, [n]; -1 is the base model."""
    embedder = embedder_of(replace(topics.embedder, prefix_tokens=prefix_tokens), folder, seed)
    numbers = {name: number for number, name in enumerate(topics.names)}
    found = []
    for start in range(0, len(texts), DOCUMENTS_AT_ONCE):
        choices = topics.choose(embedder.embed(texts[start : start + DOCUMENTS_AT_ONCE]))
        found += [-1 if each.topic is None else numbers[each.topic] for each in choices]
    return np.array(found)


class _Scorer:
    """The seed with one adapter after another, on the same documents."""

    def __init__(self, run: TaskRun, documents: HeldOutDocuments, seed_folder: Path) -> None:
        settings = run.recipe.adapters
        assert settings is not None
        self._run, self._documents = run, documents
        device = requested_device(run.task.needs.gpus)
        model = load_folder(seed_folder, inference_dtype(device, run.recipe.evaluate.dtype)).to(device)
        self._lora = LoraModel(model, settings.rank, settings.alpha, settings.targets)
        self._lora.reset(0)  # an adapter that changes nothing
        base = base_identity(run.parent(ArtifactKind.SEEDS, "seed"))
        self._indexes: dict[str, AdapterIndex] = {}
        tasks = [task for task in run.pipeline.tasks if task.kind == ArtifactKind.ADAPTERS]
        for task in tasks:
            index = AdapterIndex(run.parent(task.kind, task.name), base)
            self._indexes |= dict.fromkeys(index.names, index)
        self._done = 0

    def nll(self, chosen: np.ndarray, adapter: str | None = None) -> np.ndarray:
        """Return the sum of the NLLs of some documents, [len(chosen)].

        Without `adapter` the model is used as it is: at the start, the seed alone.
        """
        if adapter is not None:
            self._lora.load(self._indexes[adapter].read(adapter))
        self._run.context.report(Progress(self._done, len(self._indexes) + 1, note=adapter or "the seed"))
        self._done += 1
        order, sums = np.argsort(self._documents.tokens[chosen], kind="stable"), np.zeros(len(chosen))
        for start in range(0, len(order), SCORED_AT_ONCE):
            part = order[start : start + SCORED_AT_ONCE]
            sums[part] = self._sums(chosen[part])
        return sums

    def _sums(self, chosen: np.ndarray) -> np.ndarray:
        tokens, batch = self._documents.tokens[chosen], self._run.recipe.evaluate.batch_sequences
        rows = self._documents.rows[chosen, : tokens.max() + 1]
        nll = score(self._lora.model, rows, batch, self._stop_if_asked).token_nll
        is_scored = np.arange(nll.shape[1]) < tokens[:, None]
        return np.asarray((nll * is_scored).sum(axis=1, dtype=np.float64))

    def _stop_if_asked(self) -> None:
        if self._run.context.should_stop():
            raise Interrupted("the adapters are not evaluated: run the same command to evaluate them from the start")
