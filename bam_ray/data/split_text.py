"""Text that is read without near-duplicates and split into a training part and a held-out part.

The text of a domain is split alone. Text without labels is split as a whole, before its domains are known. Then the
general domain is drawn from it at random, and the other documents are clustered. The clustering is fitted to training
documents only. Held-out documents are assigned to its clusters afterwards.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bam_ray.data.deduplicate import MAX_SEEN_FRACTION, NGramHashes, NGramSet, ngram_hashes, shared_fractions
from bam_ray.data.documents import DocumentFile, FileDocuments
from bam_ray.data.sources import read_documents
from bam_ray.data.split import split_documents
from bam_ray.errors import DataError
from bam_ray.settings import DataSettings, DiscoverSettings, DomainSettings

UNLABELED = "data.discover"  # the name of text without labels, in messages and in the seed of its split

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class SplitText:
    """The documents of one domain, and their split.

    Attributes:
        documents: A file with the documents of this domain, and maybe those of others.
        ngrams: The n-grams of each document of the file.
        train: The indices of the training documents in the file, ascending.
        held_out: Those of the held-out documents.
        facts: What `corpus.json` says about the origin of the text.
    """

    documents: DocumentFile
    ngrams: list[NGramHashes]
    train: Indices
    held_out: Indices
    facts: dict[str, Any]

    @property
    def characters(self) -> int:
        """The characters of all documents of the domain."""
        characters = self.documents.characters
        return int(characters[self.train].sum() + characters[self.held_out].sum())

    def ngrams_of(self, indices: Indices) -> list[NGramHashes]:
        """Return the n-grams of some documents of the file."""
        return [self.ngrams[index] for index in indices.tolist()]


@dataclass(frozen=True)
class DiscoveredDomains:
    """The domain of each document that was clustered.

    Attributes:
        train: The domain of each training document, by its source, [n].
        held_out: The domain of each held-out document, by its source, [n].
        terms: Characteristic words of each domain.
        agreement: How well the domains agree with the sources, by name; empty if there is one source.
    """

    train: Mapping[str, Indices]
    held_out: Mapping[str, Indices]
    terms: tuple[tuple[str, ...], ...]
    agreement: dict[str, float]


class Discover(Protocol):
    """A function that clusters text."""

    def __call__(
        self,
        settings: DiscoverSettings,
        seed: int,
        train: Mapping[str, FileDocuments],
        held_out: Mapping[str, FileDocuments],
    ) -> DiscoveredDomains:
        """Return the domains of documents by their source. The clustering is fitted to training documents."""
        ...


def read_domain(name: str, settings: DataSettings, documents: DocumentFile, warn: Callable[[str], object]) -> SplitText:
    """Read the text of a domain to an empty file, and split it. `warn` is called if files are skipped.

    Raises:
        DataError: The source cannot be read or has too little text.
    """
    domain = settings.domains[name]
    ngrams: list[NGramHashes] = []
    dropped = _append(documents, ngrams, NGramSet(), name, domain, warn)
    train, held_out = _split(name, documents, ngrams, settings)
    facts = {"source": domain.source, "near_duplicates_dropped": dropped}
    return SplitText(documents, ngrams, train, held_out, facts)


class UnlabeledText:
    """Text without labels from several sources, split.

    Args:
        settings: The settings of the data, with `discover`.
        documents: An empty file for the documents.
        warn: A function that is called if files are skipped.
        reading: A function that is called with the name of each source before it is read.

    Raises:
        DataError: A source cannot be read, or there is too little text.
    """

    def __init__(
        self,
        settings: DataSettings,
        documents: DocumentFile,
        warn: Callable[[str], object],
        reading: Callable[[str], object],
    ) -> None:
        assert settings.discover is not None
        self._settings, self._discover = settings, settings.discover
        self._documents, self._dropped = documents, 0
        self._ngrams: list[NGramHashes] = []
        seen = NGramSet()
        self._bounds = [0]  # of the documents of each source
        for name, source in self._discover.sources.items():
            reading(name)
            self._dropped += _append(self._documents, self._ngrams, seen, name, source, warn)
            self._bounds.append(len(self._documents))
        self._train, self._held_out = _split(UNLABELED, self._documents, self._ngrams, settings)

    def domains(self, discover: Discover) -> tuple[dict[str, SplitText], dict[str, Any]]:
        """Draw the general domain, and discover the others.

        Args:
            discover: The function that clusters the text.

        Returns:
            The domains by name, and facts of all of this text.

        Raises:
            DataError: There is too little text for the domains.
        """
        settings, domains = self._settings, dict[str, SplitText]()
        train, held_out = self._train, self._held_out
        if settings.samples_general:
            drawn = self._sample(train), self._sample(held_out)
            domains[settings.general] = self._domain(*drawn, {})
            train, held_out = np.setdiff1d(train, drawn[0]), np.setdiff1d(held_out, drawn[1])
        found = discover(self._discover, settings.seed, self._by_source(train), self._by_source(held_out))
        of_train, of_held_out = (np.concatenate(list(each.values())) for each in (found.train, found.held_out))
        for index, name in enumerate(self._discover.names):
            own = train[of_train == index], held_out[of_held_out == index]
            domains[name] = self._domain(*own, {"terms": list(found.terms[index])})
        facts = {"near_duplicates_dropped": self._dropped, **found.agreement}
        return domains, facts

    def _sample(self, indices: Indices) -> Indices:
        """Return some of the documents, ascending; at least one."""
        count = max(1, round(self._discover.general_sample * len(indices)))
        random = np.random.default_rng([self._settings.seed, zlib.crc32(self._settings.general.encode())])
        return np.sort(random.permutation(indices)[:count])

    def _by_source(self, indices: Indices) -> dict[str, FileDocuments]:
        """Return documents at ascending indices by their source."""
        parts = np.split(indices, np.searchsorted(indices, self._bounds[1:-1]))
        return {
            name: FileDocuments(self._documents, part) for name, part in zip(self._discover.sources, parts, strict=True)
        }

    def _domain(self, train: Indices, held_out: Indices, facts: dict[str, Any]) -> SplitText:
        shares = {name: round(len(each) / max(1, len(train)), 4) for name, each in self._by_source(train).items()}
        sources = {name: share for name, share in shares.items() if share}
        return SplitText(self._documents, self._ngrams, train, held_out, {"source": sources, **facts})


def _append(
    documents: DocumentFile,
    ngrams: list[NGramHashes],
    seen: NGramSet,
    name: str,
    source: DomainSettings,
    warn: Callable[[str], object],
) -> int:
    """Read a source until `max_characters` are kept, and return the number of near-duplicates that were dropped."""
    left = source.max_characters
    before, dropped = len(documents), 0
    for document in read_documents(name, source, warn):
        text = document[:left]
        hashes = ngram_hashes(text)
        if seen.fraction(hashes) > MAX_SEEN_FRACTION:
            dropped += 1
            continue
        seen.add(hashes)
        ngrams.append(hashes)
        documents.append(text)
        if left is not None:
            left -= len(text)
            if left == 0:
                break
    if len(documents) == before and not dropped:
        raise DataError(f"domain {name}: {source.source} contains no text: name another source")
    return dropped


def _split(
    name: str, documents: DocumentFile, ngrams: list[NGramHashes], settings: DataSettings
) -> tuple[Indices, Indices]:
    return split_documents(
        name, documents.characters, shared_fractions(ngrams), settings.held_out_fraction, settings.seed
    )
