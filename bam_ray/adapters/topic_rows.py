"""The training text of topics: the documents of each topic, packed into rows of its own.

The documents of a topic are cut out of the rows of all domains, in the order of the corpus, and joined. The last row is
filled from the start of the text, so that no token of a small topic is lost.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bam_ray.data import Corpus
from bam_ray.data.corpus import Rows
from bam_ray.data.corpus_documents import CorpusDocuments
from bam_ray.errors import DataError


class TopicRows:
    """The rows of each topic, for a `BlendedSampler`.

    Args:
        corpus: The corpus that the topics were made from.
        topics: The names of the topics, in the order of their numbers.
        assignments: The number of the topic of each training document, int32 [documents], by domain; -1 for a document
            without a topic.

    Raises:
        DataError: The assignments are those of another corpus.
    """

    def __init__(self, corpus: Corpus, topics: list[str], assignments: Mapping[str, NDArray[np.int32]]) -> None:
        self.sequence_length = corpus.sequence_length
        self._numbers = {name: number for number, name in enumerate(topics)}
        self._domains = []
        for domain, assigned in sorted(assignments.items()):
            documents = CorpusDocuments(corpus, domain)
            if len(documents) != len(assigned):
                raise DataError(
                    f"domain {domain} has {len(documents)} documents, but the topics have {len(assigned)}: make "
                    "the topics of this corpus again"
                )
            # By topic, and within a topic in the order of the corpus
            order = np.argsort(assigned, kind="stable")
            self._domains.append((documents, order, assigned[order]))

    def train(self, topic: str) -> Rows:
        """Return the rows of a topic, [sequences, sequence_length]; raises `DataError` if it has no training text."""
        number = self._numbers[topic]
        parts: list[Rows] = []
        for documents, order, sorted_topics in self._domains:
            first, last = np.searchsorted(sorted_topics, [number, number + 1])
            parts += [documents.tokens(document) for document in order[first:last].tolist()]
        if not parts:
            raise DataError(f"{topic} has no training document: make fewer topics")
        text = np.concatenate(parts)
        rows = -(-len(text) // self.sequence_length)
        return np.resize(text, (rows, self.sequence_length))
