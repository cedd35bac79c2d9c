"""Find the topics of text that may be larger than memory.

    embed all text once, to a file  ─▶  cluster a sample  ─▶  prototypes  ─▶  assign all text to the nearest topic

The names of the domains are not used: they only say where a text comes from.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from bam_ray.adapters.clustering import CHUNK_PRODUCTS, density_centers, nearest_center, spherical_kmeans
from bam_ray.adapters.embedders import Embedder, EmbedderIdentity, TfidfEmbedder, load_embedder, require_package
from bam_ray.adapters.terms import characteristic_terms
from bam_ray.adapters.tfidf import fit_tfidf
from bam_ray.adapters.topic_quality import TopicQuality, topic_quality
from bam_ray.adapters.topics import ASSIGNMENTS_FILE, Topic, Topics
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.errors import DataError
from bam_ray.settings import TopicsSettings

FIT_DOCUMENTS = 1 << 17  # training documents that are clustered, at most; the others are only assigned
FIT_DOCUMENTS_PER_TOPIC = 32  # more of them if there are many topics
EMBEDDED_AT_ONCE = 512
TOKENS_PER_PREFIX_TOKEN = 8  # of the corpus, which may have much shorter tokens than the embedder
MEMBERS_PER_PROTOTYPE = 4
SHOWN_DOCUMENTS = 2000  # held-out documents of the sample, at most
LOW_QUANTILE = 0.01  # of the held-out scores of a topic, which is its threshold
QUANTILE_DOCUMENTS = 50  # held-out documents that a topic needs for a threshold of its own

Report = Callable[[int, int, str], None]
"""A function that is called with what is done, the total, and a noun phrase. It may raise `Interrupted`."""


class DocumentSource(Protocol):
    """Documents that are read by index."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The size of each document in tokens, [n]."""
        ...

    def texts(self, indices: Iterable[int], most: int | None = None) -> Iterator[str]:
        """Yield the documents at `indices`, of at most `most` tokens."""
        ...


@dataclass(frozen=True)
class FoundTopics:
    """Topics, and the topic of each document.

    Attributes:
        topics: The topics.
        embedder: The embedder of the topics.
        assignments: The topic of each document by the name of its part, such as `law/train`, [n], int32.
        sample_vectors: The vectors of some held-out documents, [m, d].
        sample_domains: The domain of each of them.
        sample_topics: The topic of each of them, [m].
    """

    topics: Topics
    embedder: Embedder
    assignments: dict[str, Tensor]
    sample_vectors: Tensor
    sample_domains: tuple[str, ...]
    sample_topics: Tensor

    @cached_property
    def quality(self) -> TopicQuality:
        """The agreement of the topics with the domains."""
        return topic_quality(self.assignments, len(self.topics))

    def save(self, folder: Path) -> None:
        """Write the topics, what their embedder needs, and the assignments to an existing folder."""
        self.topics.save(folder)
        if isinstance(self.embedder, TfidfEmbedder):
            self.embedder.table.save(folder)
        save_file(self.assignments, folder / ASSIGNMENTS_FILE)


class _Text:
    """All parts one after another, the training parts first."""

    def __init__(self, train: Mapping[str, DocumentSource], held_out: Mapping[str, DocumentSource]) -> None:
        self.parts = {f"{name}/train": each for name, each in train.items()}
        self.parts |= {f"{name}/held_out": each for name, each in held_out.items()}
        self.bounds = np.cumsum([0, *map(len, self.parts.values())])
        self.train_count = sum(map(len, train.values()))
        self.tokens = np.concatenate([each.lengths for each in train.values()])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def domain(self, index: int) -> str:
        """Return the name of the domain of a document."""
        part = list(self.parts)[int(np.searchsorted(self.bounds, index, side="right")) - 1]
        return part.rpartition("/")[0]

    def texts(self, indices: NDArray[np.int64], most: int) -> Iterator[str]:
        """Yield documents at ascending indices."""
        for documents, start, end in zip(self.parts.values(), self.bounds, self.bounds[1:], strict=False):
            inside = indices[np.searchsorted(indices, start) : np.searchsorted(indices, end)]
            yield from documents.texts((inside - start).tolist(), most)


def find_topics(
    train: Mapping[str, DocumentSource],
    held_out: Mapping[str, DocumentSource],
    settings: TopicsSettings,
    report: Report,
    seed: Path | None = None,
    device: str = "cpu",
    *,
    equal_text: bool = False,
) -> FoundTopics:
    """Cluster training text into topics, and assign all text to them.

    Args:
        train: The training documents by domain.
        held_out: The held-out documents of the same domains.
        settings: The number of topics, and how they are found.
        report: Receives the progress.
        seed: The model folder of the seed, for the embedder `seed`.
        device: The device of the embedder.
        equal_text: Find topics with similar amounts of text, and not with similar numbers of documents.

    Raises:
        DataError: There are fewer training documents than the fewest of a topic.
        SettingsError: A package is missing.
    """
    require_package("sklearn", "the search for topics")
    text = _Text(train, held_out)
    if text.train_count < settings.min_documents:
        raise DataError(
            f"there are {text.train_count} training documents, less than topics.min_documents, which is "
            f"{settings.min_documents}: provide more text or decrease it"
        )
    sample = _sample(text.train_count, settings)
    most = settings.prefix_tokens * TOKENS_PER_PREFIX_TOKEN
    if settings.embedder == "tfidf":
        report(0, len(text), "words are counted")
        table = fit_tfidf(text.texts(sample, most), settings.prefix_tokens, settings.random_seed)
        embedder: Embedder = TfidfEmbedder(table, settings.prefix_tokens)
    else:
        embedder = load_embedder(settings.embedder, settings.prefix_tokens, seed, device)
    with scratch_folder("topics") as folder:
        vectors = _embed_all(text, embedder, most, folder / "vectors", report)
        report(len(text), len(text), "documents are clustered")
        weights = torch.from_numpy(text.tokens[sample]).float() if equal_text else None
        topics = _cluster(vectors, text, sample, settings, embedder.identity, weights)
        indices, scores = _assign(topics, vectors)
        shown = _spread(text.train_count, len(text), SHOWN_DOCUMENTS)
        shown_vectors = vectors[shown]
    terms = characteristic_terms(text.texts(sample, most), indices[sample].tolist(), len(topics))
    sizes = torch.bincount(indices[: text.train_count], minlength=len(topics))
    tokens = torch.bincount(indices[: text.train_count], torch.from_numpy(text.tokens).double(), len(topics))
    thresholds = _thresholds(indices[text.train_count :], scores[text.train_count :], len(topics))
    described = [
        Topic(f"topic-{index:04}", int(sizes[index]), int(tokens[index]), terms[index], thresholds[index])
        for index in range(len(topics))
    ]
    final = Topics(embedder.identity, described, topics.prototypes, topics.prototype_topics)
    spans = zip(text.parts, text.bounds, text.bounds[1:], strict=False)
    assignments = {name: indices[start:end].int().clone() for name, start, end in spans}
    domains = tuple(text.domain(index) for index in shown.tolist())
    return FoundTopics(final, embedder, assignments, shown_vectors, domains, indices[shown])


def _sample(count: int, settings: TopicsSettings) -> NDArray[np.int64]:
    """Return which training documents are clustered, ascending."""
    most = FIT_DOCUMENTS
    if settings.count != "auto":
        most = max(most, FIT_DOCUMENTS_PER_TOPIC * settings.count)
    chosen = np.random.default_rng(settings.random_seed).permutation(count)[:most]
    return np.sort(chosen)


def _spread(start: int, end: int, most: int) -> Tensor:
    """Return at most `most` indices between two, evenly spread."""
    count = min(most, end - start)
    return start + torch.arange(count) * (end - start) // max(count, 1)


def _embed_all(text: _Text, embedder: Embedder, most: int, path: Path, report: Report) -> Tensor:
    """Return the vectors of all documents, [n, d], mapped from a new file."""
    shape = (len(text), embedder.identity.dimension)
    vectors = np.memmap(path, dtype=np.float32, mode="w+", shape=shape)
    for start in range(0, len(text), EMBEDDED_AT_ONCE):
        report(start, len(text), "documents are embedded")
        indices = np.arange(start, min(start + EMBEDDED_AT_ONCE, len(text)))
        vectors[indices] = embedder.embed(list(text.texts(indices, most))).numpy()
    return torch.from_numpy(vectors)


def _cluster(
    vectors: Tensor,
    text: _Text,
    sample: NDArray[np.int64],
    settings: TopicsSettings,
    identity: EmbedderIdentity,
    weights: Tensor | None,
) -> Topics:
    """Return topics without names, the largest first."""
    x = vectors[torch.from_numpy(sample)]
    if settings.count == "auto":
        least = max(2, round(settings.min_documents * len(sample) / text.train_count))
        centers = density_centers(x, least, settings.random_seed)
    else:
        centers = spherical_kmeans(x, settings.count, settings.random_seed, balanced=True, weights=weights)
    prototypes = _prototypes(x, centers, settings)
    train = vectors[: text.train_count]
    chosen = list(range(len(prototypes)))
    while True:  # the documents of a small topic join others, so half of the small ones are left out at a time
        sizes = torch.bincount(_assign(_unnamed(identity, prototypes, chosen), train)[0], minlength=len(chosen))
        order = sizes.sort(descending=True, stable=True).indices.tolist()
        chosen = [chosen[index] for index in order]
        small = int((sizes < settings.min_documents).sum())
        if not small:
            return _unnamed(identity, prototypes, chosen)
        del chosen[len(chosen) - (small + 1) // 2 :]


def _prototypes(x: Tensor, centers: Tensor, settings: TopicsSettings) -> list[Tensor]:
    """Return the prototypes of each cluster of x [n, d], each [p, d]; a small cluster has its center only."""
    nearest = nearest_center(x, centers)
    prototypes = []
    for index, center in enumerate(centers):
        members = x[nearest == index]
        count = min(settings.prototypes, len(members) // MEMBERS_PER_PROTOTYPE)
        several = count > 1
        prototypes.append(
            spherical_kmeans(members, count, settings.random_seed, balanced=False) if several else center[None]
        )
    return prototypes


def _unnamed(identity: EmbedderIdentity, prototypes: Sequence[Tensor], chosen: Sequence[int]) -> Topics:
    """Return some topics, by the prototypes of each [p, d]; their names and sizes are not known yet."""
    vectors = [prototypes[index] for index in chosen]
    owners = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(each) for each in vectors]))
    return Topics(identity, [Topic("", 0, 0, (), 0.0)] * len(chosen), torch.cat(vectors), owners)


def _assign(topics: Topics, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest topic of each vector and its score, each [n]: vectors [n, d]."""
    rows = max(1, CHUNK_PRODUCTS // len(topics.prototypes))
    parts = [topics.nearest(vectors[start : start + rows]) for start in range(0, len(vectors), rows)]
    return torch.cat([part.topics for part in parts]), torch.cat([part.scores for part in parts])


def _thresholds(indices: Tensor, scores: Tensor, count: int) -> list[float]:
    """Return a low quantile of the held-out scores of each topic; topics with few of them share that of all."""
    if len(scores) == 0:
        return [0.0] * count
    common = float(np.quantile(scores.numpy(), LOW_QUANTILE))
    return [
        float(np.quantile(own.numpy(), LOW_QUANTILE))
        if len(own := scores[indices == index]) >= QUANTILE_DOCUMENTS
        else common
        for index in range(count)
    ]
