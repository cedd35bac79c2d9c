"""Discovered domains: clusters of text that are found without labels, and that other text is assigned to."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch

from bam_ray.adapters.discover_domains import discover_domains
from bam_ray.adapters.embedders import embedder_of
from bam_ray.adapters.topics import Topics
from bam_ray.data.documents import DocumentFile, FileDocuments
from bam_ray.data.split_text import DiscoveredDomains
from bam_ray.errors import DataError
from bam_ray.settings import DiscoverSettings

SUBJECTS = ("court license contract judge", "function return import class", "patient dose cohort trial")


def text(subject: int, number: int) -> str:
    draw = random.Random(f"{subject} {number}")
    return " ".join(draw.choices(SUBJECTS[subject].split(), k=12) + draw.choices(["the", "and", "for"], k=12))


class Text:
    """Two sources of documents of the subjects in turn. The second source has the last subject only."""

    def __init__(self, folder: Path, stack: ExitStack, held_out_words: str = "") -> None:
        self.file = stack.enter_context(closing(DocumentFile(folder / f"documents{held_out_words[:4]}")))
        for number in range(80):
            self.file.append(text(number % 2, number))
        for number in range(40):
            self.file.append(text(2, number))
        for subject in range(3):
            self.file.append(f"{text(subject, 100)} {held_out_words}")
        self.train = {"first": self._part(range(80)), "second": self._part(range(80, 120))}
        self.held_out = {"first": self._part(range(120, 122)), "second": self._part(range(122, 123))}

    def _part(self, indices: range) -> FileDocuments:
        return FileDocuments(self.file, np.array(indices))

    def discover(self, folder: Path, domains: int = 3) -> DiscoveredDomains:
        """Return the domains, and write the clustering to a folder."""
        settings = DiscoverSettings.model_validate({"domains": domains, "sources": {"x": {"source": "x"}}})
        return discover_domains(settings, 3, self.train, self.held_out, folder, lambda done, total, note: None)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_each_subject_is_a_domain(tmp_path: Path, stack: ExitStack) -> None:
    found = Text(tmp_path, stack).discover(tmp_path / "found")
    first, second = found.train["first"], found.train["second"]
    assert len(first) == 80 and len(second) == 40
    assert [len(set(part.tolist())) for part in (first[::2], first[1::2], second)] == [1, 1, 1]
    main = [int(first[0]), int(first[1]), int(second[0])]
    assert sorted(main) == [0, 1, 2]
    assert [*found.held_out["first"], *found.held_out["second"]] == main
    assert [set(found.terms[index][:4]) for index in main] == [set(subject.split()) for subject in SUBJECTS]
    assert found.agreement["purity"] == found.agreement["held_out_accuracy"] == 1.0
    assert 0.5 < found.agreement["adjusted_mutual_information"] < 1.0, "two domains are of one source"


def test_other_text_is_assigned_by_the_stored_clustering(tmp_path: Path, stack: ExitStack) -> None:
    found = Text(tmp_path, stack).discover(tmp_path / "found")
    topics = Topics.load(tmp_path / "found")
    assert topics.names == ("domain-0", "domain-1", "domain-2")
    embedder = embedder_of(topics.embedder, tmp_path / "found")
    chosen = topics.nearest(embedder.embed([text(subject, 200) for subject in range(3)])).topics.tolist()
    assert chosen == [found.train["first"][0], found.train["first"][1], found.train["second"][0]]


def test_held_out_text_does_not_change_the_clustering(tmp_path: Path, stack: ExitStack) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    found = [
        Text(tmp_path / name, stack, words).discover(tmp_path / name / "found")
        for name, words in (("a", ""), ("b", "words that no training document has " * 20))
    ]
    assert found[0].terms == found[1].terms
    assert all(np.array_equal(found[0].train[source], found[1].train[source]) for source in ("first", "second"))
    first, second = (Topics.load(tmp_path / name / "found") for name in ("a", "b"))
    assert first.embedder == second.embedder
    assert torch.equal(first.prototypes, second.prototypes)


def test_the_domains_are_repeatable(tmp_path: Path, stack: ExitStack) -> None:
    documents = Text(tmp_path, stack)
    documents.discover(tmp_path / "first")
    documents.discover(tmp_path / "second")
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_too_few_clusters_are_an_error(tmp_path: Path, stack: ExitStack) -> None:
    documents = Text(tmp_path, stack)
    documents.train = {"first": FileDocuments(documents.file, np.array([0, 1, 80, 0, 1, 80]))}
    documents.held_out = {"first": FileDocuments(documents.file, np.array([120]))}
    with pytest.raises(DataError, match="domains is 5, but only 3 clusters were found: decrease it or provide more"):
        documents.discover(tmp_path / "found", domains=5)
