"""Packing documents into rows of tokens.

Documents are tokenized in batches, concatenated with an end-of-text token after each, and cut into rows of equal
length. A file of packed tokens contains only little-endian integers, row after row, and is read by mapping it into
memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class PackedFile:
    """The contents of one file of packed tokens."""

    tokens: int  # including those of the last, incomplete row, which is dropped
    sequences: int


def token_dtype(vocab_size: int) -> "np.dtype[np.unsignedinteger]":
    """Return the smaller of uint16 and uint32 that holds every token."""
    return np.dtype("<u2") if vocab_size < 1 << 16 else np.dtype("<u4")


def pack_documents(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    end_of_text_id: int,
    sequence_length: int,
    dtype: "np.dtype[np.unsignedinteger]",
    path: Path,
) -> PackedFile:
    """Tokenize `texts` and write their rows to `path`."""
    tokens = 0
    with path.open("wb") as file:
        for batch in _batches(texts):
            ids: list[int] = []
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                ids += encoding.ids
                ids.append(end_of_text_id)
            file.write(np.array(ids, dtype=dtype).tobytes())
            tokens += len(ids)
        sequences = tokens // sequence_length
        file.truncate(sequences * sequence_length * dtype.itemsize)
    return PackedFile(tokens, sequences)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group `texts` into lists of at least `BATCH_CHARACTERS` characters, except for the last one."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
