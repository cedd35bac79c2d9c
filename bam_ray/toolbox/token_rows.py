"""Tokens of text that the user gives: rows for router fits, importance scores and perplexity tables, and counts."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.data.sources import read_documents
from bam_ray.errors import DataError
from bam_ray.settings import DomainSettings
from bam_ray.upcycling.routers.counts import BUCKETS, CHUNK_TOKENS, TokenCounts, count_stream
from bam_ray.upcycling.tokenizers import load_tokenizer

MIN_ROWS = 2


def token_rows(name: str, source: str, model: TensorReader, sequences: int, length: int) -> Tensor:
    """Return the first rows of a text, int64 [S, length], tokenized with the tokenizer of `model`.

    Documents are concatenated, with the model's end-of-text token after each.

    Args:
        name: Name of the text, for error messages.
        source: A source as in a recipe's domains: a path, glob or URI of text, JSONL or Parquet files, or
            `package:NAME`.
        model: The model whose tokenizer is used.
        sequences: Number of rows S. There are fewer if the text is short.
        length: Tokens per row.

    Raises:
        DataError: The text has less than two rows.
        CheckpointError: The model has no tokenizer that can be loaded.
    """
    tokens: list[int] = []
    for document in _documents(name, source, model):
        tokens += document
        if len(tokens) >= sequences * length:
            break
    rows = min(sequences, len(tokens) // length)
    if rows < MIN_ROWS:
        raise DataError(f"the text {source} of {name!r} has {len(tokens)} tokens: provide at least {MIN_ROWS * length}")
    return torch.tensor(tokens[: rows * length]).view(rows, length)


def text_counts(
    name: str, source: str, model: TensorReader, vocab_size: int | None = None, buckets: int = BUCKETS
) -> TokenCounts:
    """Count all tokens of a text, and its pairs, with the tokenizer of `model`. The text is not held in memory.

    Args:
        name: Name of the text, for error messages.
        source: A source as in a recipe's domains (see `token_rows`).
        model: The model whose tokenizer is used.
        vocab_size: The number of tokens that are counted; None: the vocabulary size of the model.
        buckets: The number of buckets of pairs.

    Raises:
        DataError: The source cannot be read, or the tokenizer has more tokens than the model.
        CheckpointError: The model has no tokenizer that can be loaded.
    """

    def chunks() -> Iterator[NDArray[np.int64]]:
        tokens: list[int] = []
        for document in _documents(name, source, model):
            tokens += document
            if len(tokens) >= CHUNK_TOKENS:
                yield np.array(tokens)
                tokens = []
        yield np.array(tokens, np.int64)

    return count_stream(chunks(), vocab_size or model.config["vocab_size"], _end_of_text(model), buckets)


def _documents(name: str, source: str, model: TensorReader) -> Iterator[list[int]]:
    """Yield the tokens of each document, with the model's end-of-text token as the last one if it has one."""
    tokenizer = load_tokenizer(model)
    tokenizer.encode_special_tokens = True
    end = _end_of_text(model)
    for text in read_documents(name, DomainSettings(source=source)):
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        yield tokens if end is None else [*tokens, end]


def _end_of_text(model: TensorReader) -> int | None:
    ends = model.config.get("eos_token_id")
    end: int | None = ends[0] if isinstance(ends, list) else ends
    return end
