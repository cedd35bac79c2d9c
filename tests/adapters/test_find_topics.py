"""The search for topics: text of two kinds, read by index, becomes topics that do not mix them."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from bam_ray.adapters import find_topics as module
from bam_ray.adapters.embedders import embedder_of
from bam_ray.adapters.find_topics import FoundTopics, find_topics
from bam_ray.adapters.terms import characteristic_terms
from bam_ray.adapters.topic_quality import topic_quality
from bam_ray.adapters.topics import Topics
from bam_ray.errors import DataError, Interrupted
from bam_ray.settings import TopicsSettings

SUBJECTS = {
    "law": ["court license contract judge", "tax income duty payment"],
    "code": ["function return import class", "pixel color width screen"],
}


@dataclass(frozen=True)
class ListedDocuments:
    """Documents in a list; a word is a token."""

    documents: list[str]

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(text.split()) for text in self.documents], dtype=np.int64)

    def texts(self, indices: Iterable[int], most: int | None = None) -> Iterator[str]:
        for index in indices:
            yield " ".join(self.documents[index].split()[:most])


def some_text(domain: str, part: str, count: int) -> ListedDocuments:
    """Return documents of the two subjects of a domain in turn, with some words that all documents share."""
    draw = random.Random(f"{domain} {part}")
    words = [subject.split() for subject in SUBJECTS[domain]]
    texts = [
        draw.choices(words[number % 2], k=12) + draw.choices(["the", "and", "for"], k=12) for number in range(count)
    ]
    return ListedDocuments([" ".join(text) for text in texts])


def found(**changes: object) -> FoundTopics:
    """Return the topics of some text."""
    settings = TopicsSettings.model_validate({"count": 4, "embedder": "tfidf", "min_documents": 5, **changes})
    train = {domain: some_text(domain, "train", 40) for domain in SUBJECTS}
    held_out = {domain: some_text(domain, "held_out", 12) for domain in SUBJECTS}
    return find_topics(train, held_out, settings, lambda done, total, note: None)


def test_each_subject_is_a_topic() -> None:
    topics = found()
    assert topics.topics.names == ("topic-0000", "topic-0001", "topic-0002", "topic-0003")
    assert [(topic.documents, topic.tokens) for topic in topics.topics.topics] == [(20, 480)] * 4
    subjects = {frozenset(subject.split()) for domain in SUBJECTS.values() for subject in domain}
    assert {frozenset(topic.terms[:4]) for topic in topics.topics.topics} == subjects
    assert topics.quality.purity == topics.quality.held_out_accuracy == 1.0
    for domain in SUBJECTS:
        for part, count in (("train", 40), ("held_out", 12)):
            assigned = topics.assignments[f"{domain}/{part}"]
            assert assigned.dtype == torch.int32
            assert len(assigned) == count
            assert len(set(assigned[::2].tolist())) == len(set(assigned[1::2].tolist())) == 1


def test_the_server_chooses_the_assigned_topic(tmp_path: Path) -> None:
    topics = found()
    topics.save(tmp_path)
    loaded = Topics.load(tmp_path)
    assert load_file(tmp_path / "assignments.safetensors").keys() == topics.assignments.keys()
    embedder = embedder_of(loaded.embedder, tmp_path)
    texts = some_text("law", "train", 40).documents
    chosen = loaded.nearest(embedder.embed(texts)).topics
    assert torch.equal(chosen.int(), topics.assignments["law/train"])
    (far,) = loaded.choose(embedder.embed(["unknown words only"]))
    assert far.topic is None


def test_the_result_is_repeatable_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    first = found(count=7, random_seed=3)
    monkeypatch.setattr(module, "EMBEDDED_AT_ONCE", 7)
    monkeypatch.setattr(module, "CHUNK_PRODUCTS", 100)
    again = found(count=7, random_seed=3)
    assert first.topics.topics == again.topics.topics
    assert all(torch.equal(first.assignments[part], again.assignments[part]) for part in first.assignments)


def test_a_sample_is_clustered_and_all_text_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIT_DOCUMENTS", 40)
    monkeypatch.setattr(module, "FIT_DOCUMENTS_PER_TOPIC", 1)
    topics = found()
    assert sum(topic.documents for topic in topics.topics.topics) == 80
    assert topics.quality.held_out_accuracy == 1.0


def test_small_topics_join_the_others() -> None:
    topics = found(count=30, min_documents=15)
    assert all(topic.documents >= 15 for topic in topics.topics.topics)
    assert sum(topic.documents for topic in topics.topics.topics) == 80
    assert len(topics.topics) >= 3
    assert len(found(count=40, min_documents=80).topics) == 1


def test_auto_finds_the_number_of_topics() -> None:
    topics = found(count="auto", min_documents=8)
    assert len(topics.topics) == 4
    assert topics.quality.purity == 1.0


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(DataError, match="provide more text"):
        found(min_documents=81)


def test_the_search_stops_on_request() -> None:
    def stop(done: int, total: int, note: str) -> None:
        if note == "documents are embedded":
            raise Interrupted("stop")

    text = {"law": some_text("law", "train", 40)}
    settings = TopicsSettings(count=2, embedder="tfidf")
    with pytest.raises(Interrupted):
        find_topics(text, text, settings, stop)


def test_terms_are_rare_elsewhere() -> None:
    texts = ["the apple the pear the", "the car the road", "the apple"]
    assert characteristic_terms(texts, [0, 1, 0], 2) == [("apple", "pear", "the"), ("car", "road", "the")]


def test_quality_compares_main_domains() -> None:
    parts = {
        "a/train": torch.tensor([0, 0, 1]),
        "b/train": torch.tensor([1, 1, 0]),
        "a/held_out": torch.tensor([0, 1, 0, 0]),
        "b/held_out": torch.tensor([1, 1]),
    }
    quality = topic_quality({name: each.int() for name, each in parts.items()}, 2)
    assert quality.purity == pytest.approx(4 / 6)
    assert quality.held_out_accuracy == pytest.approx(5 / 6)
    assert quality.main_domain(1) == ("b", pytest.approx(2 / 3))
