"""Discover domains in text without labels, as in c-BTM (arXiv 2303.14177): tf-idf, an SVD and balanced k-means.

The search is that of topics, for a fixed number of clusters. c-BTM balances the numbers of documents. Here, the amounts
of text are balanced, because every branch needs text, and documents have different lengths.

The folder that it writes is a folder of topics with the names of the domains, so `Topics` and `embedder_of` assign
other text to the domains.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bam_ray.adapters.embedders import require_package
from bam_ray.adapters.find_topics import FoundTopics, Report, find_topics
from bam_ray.adapters.topics import Topics
from bam_ray.data.documents import FileDocuments
from bam_ray.data.split_text import DiscoveredDomains
from bam_ray.errors import DataError
from bam_ray.settings import DiscoverSettings, TopicsSettings


def discover_domains(
    settings: DiscoverSettings,
    seed: int,
    train: Mapping[str, FileDocuments],
    held_out: Mapping[str, FileDocuments],
    folder: Path,
    report: Report,
) -> DiscoveredDomains:
    """Cluster training documents into domains, assign all documents to them, and write the clustering.

    Args:
        settings: The number of domains, and how much of a document is read.
        seed: The random seed of the clustering.
        train: The training documents by source.
        held_out: The held-out documents of the same sources.
        folder: A new folder.
        report: Receives the progress.

    Raises:
        DataError: The text does not have so many clusters.
        SettingsError: A package is missing.
    """
    require_package("sklearn", "data.discover")
    found = find_topics(
        train,
        held_out,
        TopicsSettings(
            count=settings.domains,
            embedder="tfidf",
            prefix_tokens=settings.prefix_words,
            min_documents=1,
            random_seed=seed,
        ),
        report,
        equal_text=True,
    )
    if len(found.topics) < settings.domains:
        raise DataError(
            f"data.discover.domains is {settings.domains}, but only {len(found.topics)} clusters were found: decrease "
            "it or provide more text"
        )
    described = [replace(topic, name=name) for topic, name in zip(found.topics.topics, settings.names, strict=True)]
    named = Topics(found.topics.embedder, described, found.topics.prototypes, found.topics.prototype_topics)
    folder.mkdir()
    replace(found, topics=named).save(folder)
    return DiscoveredDomains(
        {source: _indices(found.assignments[f"{source}/train"]) for source in train},
        {source: _indices(found.assignments[f"{source}/held_out"]) for source in held_out},
        tuple(topic.terms for topic in described),
        _agreement(found),
    )


def _indices(assigned: Tensor) -> NDArray[np.int64]:
    return assigned.numpy().astype(np.int64)


def _agreement(found: FoundTopics) -> dict[str, float]:
    """Return how well the domains agree with the sources; empty if there is one source."""
    return {name.removeprefix("topics/"): round(value, 4) for name, value in found.quality.metrics.items()}
