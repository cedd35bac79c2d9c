"""Rows of tokens from text that the user gives: for router fits, importance scores and perplexity tables."""

import torch
from torch import Tensor

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.data.sources import read_documents
from bam_ray.errors import DataError
from bam_ray.settings import DomainSettings
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
    tokenizer = load_tokenizer(model)
    tokenizer.encode_special_tokens = True
    ends = model.config.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) else ends
    tokens: list[int] = []
    for text in read_documents(name, DomainSettings(source=source)):
        tokens += tokenizer.encode(text, add_special_tokens=False).ids
        if end is not None:
            tokens.append(end)
        if len(tokens) >= sequences * length:
            break
    rows = min(sequences, len(tokens) // length)
    if rows < MIN_ROWS:
        raise DataError(f"the text {source} of {name!r} has {len(tokens)} tokens: provide at least {MIN_ROWS * length}")
    return torch.tensor(tokens[: rows * length]).view(rows, length)
