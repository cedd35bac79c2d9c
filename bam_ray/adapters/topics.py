"""Topics: clusters of text, each with vectors that a text is compared with to find its topic.

    topics.json          the identity of the embedder; each topic's name, size, terms and threshold
    topics.safetensors   prototypes [P, d] float32 of length 1, and prototype_topics [P] int64, in ascending order

A topic has several prototypes (as in ARIADNE, arXiv 2606.19079), because a cluster is rarely round. The nearest topic
of a text is that of the prototype with the largest cosine similarity. A text that is farther from its nearest topic
than 99 % of the held-out text of this topic has no topic, and the base model serves it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bam_ray.adapters.embedders import EmbedderIdentity
from bam_ray.errors import CheckpointError

VERSION = 1
TOPICS_FILE, PROTOTYPES_FILE, ASSIGNMENTS_FILE = "topics.json", "topics.safetensors", "assignments.safetensors"
LOWEST_SCORE = -1.0  # of cosine similarity


@dataclass(frozen=True)
class Topic:
    """One topic.

    Attributes:
        name: The name, which its adapter has too: `topic-0000`.
        documents: The number of training documents.
        tokens: The tokens of these documents.
        terms: Words that are frequent in this topic and rare in others, the most characteristic first.
        threshold: The smallest score with which a text belongs to the topic.
    """

    name: str
    documents: int
    tokens: int
    terms: tuple[str, ...]
    threshold: float


@dataclass(frozen=True)
class TopicsFacts:
    """The content of `topics.json`."""

    version: int
    embedder: EmbedderIdentity
    topics: tuple[Topic, ...]


class NearestTopics(NamedTuple):
    """The nearest topic of each text.

    Attributes:
        topics: The index of the topic, [n], int64.
        scores: The cosine similarity to the nearest prototype of the topic, [n].
        margins: The score minus that of the best other topic, [n]; without another topic, minus the lowest score.
    """

    topics: Tensor
    scores: Tensor
    margins: Tensor


@dataclass(frozen=True)
class TopicChoice:
    """The topic of one text.

    Attributes:
        topic: The name of the topic; None if the text is far from all topics, so that the base model serves it.
        nearest: The name of the nearest topic.
        score: The cosine similarity to it.
        margin: The score minus that of the best other topic.
        threshold: The smallest score with which a text belongs to the nearest topic.
    """

    topic: str | None
    nearest: str
    score: float
    margin: float
    threshold: float


class Topics:
    """The topics of a corpus, in memory.

    Args:
        embedder: The identity of the embedder of the prototypes.
        topics: The topics, by their index.
        prototypes: Vectors of length 1, [P, d], float32, those of one topic next to each other.
        prototype_topics: The topic of each prototype, [P], int64, ascending; every topic occurs.
    """

    def __init__(
        self, embedder: EmbedderIdentity, topics: Sequence[Topic], prototypes: Tensor, prototype_topics: Tensor
    ) -> None:
        self.embedder, self.topics = embedder, tuple(topics)
        self.prototypes, self.prototype_topics = prototypes, prototype_topics
        counts = torch.bincount(prototype_topics, minlength=len(self.topics))
        self._equal_count = int(counts[0]) if bool((counts == counts[0]).all()) else None
        self._transposed = prototypes.T.contiguous()  # a product with one row reads this layout faster

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the topics."""
        return tuple(topic.name for topic in self.topics)

    def __len__(self) -> int:
        return len(self.topics)

    def scores(self, embeddings: Tensor) -> Tensor:
        """Return the cosine similarity of vectors [n, d] to the nearest prototype of each topic, [n, T]."""
        products = embeddings @ self._transposed  # [n, P]
        if self._equal_count is not None:
            return products.view(len(products), -1, self._equal_count).amax(-1)
        index = self.prototype_topics.expand_as(products)
        lowest = products.new_full((len(products), len(self)), LOWEST_SCORE)
        return lowest.scatter_reduce(1, index, products, "amax")

    def nearest(self, embeddings: Tensor) -> NearestTopics:
        """Return the nearest topic of each vector: embeddings [n, d], of length 1."""
        scores = self.scores(embeddings)
        if len(self) == 1:
            return NearestTopics(torch.zeros(len(scores), dtype=torch.int64), scores[:, 0], scores[:, 0] - LOWEST_SCORE)
        best = scores.topk(2)
        return NearestTopics(best.indices[:, 0], best.values[:, 0], best.values[:, 0] - best.values[:, 1])

    def choose(self, embeddings: Tensor) -> list[TopicChoice]:
        """Return the choice for each vector: embeddings [n, d], of length 1."""
        choices = []
        nearest = self.nearest(embeddings)
        for index, score, margin in zip(*(each.tolist() for each in nearest), strict=True):
            topic = self.topics[index]
            name = topic.name if score >= topic.threshold else None
            choices.append(TopicChoice(name, topic.name, score, margin, topic.threshold))
        return choices

    def save(self, folder: Path) -> None:
        """Write both files to an existing folder. Files of the embedder `tfidf` are written by its table."""
        facts = TopicsFacts(VERSION, self.embedder, self.topics)
        (folder / TOPICS_FILE).write_text(json.dumps(asdict(facts), indent=1))
        tensors = {"prototypes": self.prototypes, "prototype_topics": self.prototype_topics}
        save_file(tensors, folder / PROTOTYPES_FILE)

    @staticmethod
    def load(folder: Path) -> "Topics":
        """Read the topics in a folder; raises `CheckpointError` if there are none or they are damaged."""
        try:
            facts = TypeAdapter(TopicsFacts).validate_json((folder / TOPICS_FILE).read_bytes())
            tensors = load_file(folder / PROTOTYPES_FILE)
            prototypes, owners = tensors["prototypes"], tensors["prototype_topics"]
        except (OSError, ValidationError, KeyError, SafetensorError):
            raise CheckpointError(f"{folder} has no topics, or they are damaged: make them with `bam topics`") from None
        if facts.version != VERSION:
            raise CheckpointError(
                f"the topics in {folder} have version {facts.version}: use a newer release of bam-ray"
            )
        fits = prototypes.shape == (len(owners), facts.embedder.dimension)
        if not fits or not torch.equal(owners.unique(), torch.arange(len(facts.topics))):
            raise CheckpointError(f"{folder}/{PROTOTYPES_FILE} does not match {TOPICS_FILE}: make the topics again")
        return Topics(facts.embedder, facts.topics, prototypes, owners)
