"""A packed corpus: a folder that is opened and mapped into memory, not loaded.

corpus.json              facts: the sequence length, the vocabulary size, and counts for each domain
tokenizer/               a Hugging Face tokenizer folder
<domain>/train.bin       rows of tokens, little-endian (see `packing`)
<domain>/held_out.bin
counts.safetensors       how often each token occurs in the training rows of each domain; the corpus stage writes it
discovered/              a folder of topics, which assigns other text to the discovered domains (see `discover_domains`)
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bam_ray.errors import DataError

FACTS = "corpus.json"
TOKENIZER = "tokenizer"
DISCOVERED = "discovered"
TRAIN = "train.bin"
HELD_OUT = "held_out.bin"

Rows = NDArray[np.unsignedinteger]
"""Packed sequences, [sequences, sequence_length], uint16 or uint32."""


class Corpus:
    """The corpus in a folder.

    Raises:
        DataError: The folder is not a corpus.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        try:
            self.facts: dict[str, Any] = json.loads((self._folder / FACTS).read_text())
        except (OSError, ValueError):
            raise DataError(f"{folder} is not a corpus (it has no readable {FACTS}): build it again") from None
        self.domains: tuple[str, ...] = tuple(self.facts["domains"])
        self.sequence_length: int = self.facts["sequence_length"]
        self.vocab_size: int = self.facts["vocab_size"]
        self.end_of_text_id: int = self.facts["end_of_text_id"]
        self.attend_across_documents: bool = self.facts["attend_across_documents"]
        self._dtype = np.dtype(self.facts["dtype"])

    @property
    def tokenizer_folder(self) -> Path:
        """The folder for `AutoTokenizer.from_pretrained`."""
        return self._folder / TOKENIZER

    def train(self, domain: str) -> Rows:
        """Return the training rows, [sequences, sequence_length], mapped from disk."""
        return self._rows(domain, TRAIN)

    def held_out(self, domain: str) -> Rows:
        """Return the rows for evaluation, [sequences, sequence_length], mapped from disk."""
        return self._rows(domain, HELD_OUT)

    def _rows(self, domain: str, name: str) -> Rows:
        if domain not in self.domains:
            raise DataError(f"the corpus has no domain {domain!r}: use one of {', '.join(self.domains)}")
        try:
            return np.memmap(self._folder / domain / name, dtype=self._dtype, mode="r").reshape(
                -1, self.sequence_length
            )
        except (OSError, ValueError):
            raise DataError(f"{self._folder / domain / name} is missing or damaged: build the corpus again") from None
