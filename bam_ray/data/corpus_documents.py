"""The documents of a packed corpus, found again in its rows of tokens.

A document ends with the end-of-text token. The last document of a part has none if the incomplete row at the end of the
part was dropped. Documents that were in this row only are lost. The order is that of the corpus.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bam_ray.data.corpus import Corpus
from bam_ray.data.tokenizer import load_for_packing

CHUNK_TOKENS = 1 << 24  # tokens that are searched for ends at once


class CorpusDocuments:
    """The documents of one part of one domain, in order; their tokens are mapped from disk.

    Args:
        corpus: The corpus.
        domain: The name of a domain.
        held_out: True for the held-out part.

    Raises:
        DataError: The corpus has no such domain.
    """

    def __init__(self, corpus: Corpus, domain: str, *, held_out: bool = False) -> None:
        rows = corpus.held_out(domain) if held_out else corpus.train(domain)
        self._tokens = rows.reshape(-1)
        self._tokenizer_folder: Path = corpus.tokenizer_folder
        self._tokenizer: Tokenizer | None = None
        self.bounds = _bounds(self._tokens, corpus.end_of_text_id)
        """The first token of each document, and the end of the last one, [documents + 1], int64."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The tokens of each document, including the end-of-text token."""
        return np.diff(self.bounds)

    def tokens(self, index: int, most: int | None = None) -> NDArray[np.unsignedinteger]:
        """Return at most `most` tokens of a document, including the end-of-text token."""
        start, end = self.bounds[index : index + 2].tolist()
        return self._tokens[start : end if most is None else min(end, start + most)]

    def texts(self, indices: Iterable[int], most: int | None = None) -> Iterator[str]:
        """Yield the documents at `indices` as text, of at most `most` tokens."""
        if self._tokenizer is None:
            self._tokenizer = load_for_packing(self._tokenizer_folder)
        for index in indices:
            yield self._tokenizer.decode(self.tokens(index, most).tolist(), skip_special_tokens=True)


def _bounds(tokens: NDArray[np.unsignedinteger], end_of_text_id: int) -> NDArray[np.int64]:
    """Return the first token of each document and the end of the last one."""
    starts = [np.zeros(1, dtype=np.int64)]
    for first in range(0, len(tokens), CHUNK_TOKENS):
        ends = np.flatnonzero(tokens[first : first + CHUNK_TOKENS] == end_of_text_id)
        starts.append(first + ends + 1)
    bounds = np.concatenate(starts)
    return bounds if bounds[-1] == len(tokens) else np.append(bounds, len(tokens))
