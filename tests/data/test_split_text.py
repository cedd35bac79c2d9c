"""Text without labels: it is split before it is clustered, and each document is in one part of one domain."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bam_ray.data import Corpus, build_corpus
from bam_ray.data.corpus_documents import CorpusDocuments
from bam_ray.data.documents import FileDocuments
from bam_ray.data.split_text import DiscoveredDomains, Indices
from bam_ray.errors import DataError
from bam_ray.settings import DataSettings, DiscoverSettings

LETTERS = {0: "abcdef", 1: "uvwxyz"}


def document(kind: int, number: int) -> str:
    """Return a document of one of two kinds, which its first letter shows."""
    words = random.Random(f"{kind} {number}")
    return " ".join("".join(words.choices(LETTERS[kind], k=4)) for _ in range(60))


def write(folder: Path, texts: Mapping[str, list[str]], **changes: Any) -> DataSettings:
    """Write sources without labels and return the settings."""
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    discover = {"domains": 2, "sources": {name: {"source": str(folder / f"{name}.jsonl")} for name in texts}}
    plain = {"discover": discover, "sequence_length": 16, "held_out_fraction": 0.2, "tokenizer": {"vocab_size": 300}}
    return DataSettings.model_validate({**plain, **changes})


class FirstLetters:
    """A clustering by the first letter. It remembers what it was given."""

    def __init__(self) -> None:
        self.train: list[str] = []
        self.held_out: list[str] = []

    def __call__(
        self,
        settings: DiscoverSettings,
        seed: int,
        train: Mapping[str, FileDocuments],
        held_out: Mapping[str, FileDocuments],
    ) -> DiscoveredDomains:
        """Return the kind of each document."""
        self.train = [text for part in train.values() for text in part.texts(range(len(part)))]
        self.held_out = [text for part in held_out.values() for text in part.texts(range(len(part)))]
        terms = (("letters", "first"), ("letters", "last"))
        return DiscoveredDomains(kinds(train), kinds(held_out), terms, {"purity": 1.0})


def kinds(parts: Mapping[str, FileDocuments]) -> dict[str, Indices]:
    return {
        name: np.array([int(text[0] in LETTERS[1]) for text in part.texts(range(len(part)))], dtype=np.int64)
        for name, part in parts.items()
    }


def texts_of(corpus: Corpus, domain: str) -> tuple[set[str], set[str]]:
    """Return the training and the held-out documents of a domain, without the last one, which may be cut."""
    parts = [CorpusDocuments(corpus, domain, held_out=held_out) for held_out in (False, True)]
    train, held_out = (set(part.texts(range(len(part) - 1))) for part in parts)
    return train, held_out


def mixed() -> dict[str, list[str]]:
    """Return two sources that both have documents of both kinds, of which the first has more."""
    first = [document(number % 3 == 0, number) for number in range(90)]
    second = [document(1, number) for number in range(100, 130)] + [first[0] + " again"]
    return {"first": first, "second": second}


def test_each_document_is_in_one_part_of_one_domain(tmp_path: Path) -> None:
    discover, reports = FirstLetters(), list[str]()
    facts = build_corpus(write(tmp_path, mixed()), tmp_path / "corpus", reports.append, discover)
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.domains == ("general", "domain-0", "domain-1")
    assert reports[:3] == ["reading first", "reading second", "discovering domains"]
    everything = {text for documents in mixed().values() for text in documents}
    seen: set[str] = set()
    for domain in corpus.domains:
        for part in texts_of(corpus, domain):
            assert part and part <= everything
            assert not part & seen
            seen |= part
    for index, domain in enumerate(("domain-0", "domain-1")):
        train, held_out = texts_of(corpus, domain)
        assert train <= set(discover.train)
        assert held_out <= set(discover.held_out)
        assert all(text[0] in LETTERS[index] for text in train | held_out)
    counts = facts["domains"]
    documents = {name: each["train_documents"] + each["held_out_documents"] for name, each in counts.items()}
    assert sum(documents.values()) == 120, "a near-duplicate between the sources is dropped"
    assert documents["general"] == 12
    assert facts["discovered"] == {"near_duplicates_dropped": 1, "purity": 1.0}


def test_the_facts_say_where_a_domain_comes_from(tmp_path: Path) -> None:
    facts = build_corpus(write(tmp_path, mixed()), tmp_path / "corpus", lambda _: None, FirstLetters())
    first, second = facts["domains"]["domain-0"], facts["domains"]["domain-1"]
    assert first["source"] == {"first": 1.0}
    assert set(second["source"]) == {"first", "second"}
    assert sum(second["source"].values()) == pytest.approx(1.0, abs=1e-3)
    assert second["terms"] == ["letters", "last"]
    assert set(facts["domains"]["general"]["source"]) == {"first", "second"}
    assert "terms" not in facts["domains"]["general"]


def test_a_named_general_domain_leaves_all_text(tmp_path: Path) -> None:
    (tmp_path / "web.txt").write_text("<|endoftext|>".join(document(0, number) for number in range(500, 520)))
    domains = {"general": {"source": str(tmp_path / "web.txt")}}
    settings = write(tmp_path, mixed(), domains=domains)
    facts = build_corpus(settings, tmp_path / "corpus", lambda _: None, FirstLetters())
    assert list(facts["domains"]) == ["general", "domain-0", "domain-1"]
    assert facts["domains"]["general"]["source"] == str(tmp_path / "web.txt")
    found = [facts["domains"][name] for name in ("domain-0", "domain-1")]
    assert sum(each["train_documents"] + each["held_out_documents"] for each in found) == 120


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    settings = write(tmp_path, {**mixed(), "third": []})
    with pytest.raises(DataError, match=r"third: .*third\.jsonl contains no text: name another source"):
        build_corpus(settings, tmp_path / "corpus", lambda _: None, FirstLetters())
