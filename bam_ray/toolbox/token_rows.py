"""Text of the user's as rows of tokens, for what needs a little of it: router fits, neurons' importance, tables."""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.data.sources import read_documents
from bam_ray.errors import CheckpointError, DataError
from bam_ray.settings import DomainSettings

LEAST_ROWS = 2


def token_rows(name: str, source: str, model: TensorReader, sequences: int, length: int) -> Tensor:
    """The first `sequences` rows of the text at `source`, int64 [S, length], by the tokenizer of `model`.

    `source` is what a recipe's domains take: a path, glob or URI of text, JSONL or Parquet files, or `package:NAME`.
    Documents lie end to end with the model's end-of-text token after each. There may be fewer rows where the text is
    short; raises `DataError` where there are not two, `CheckpointError` where the model has no fast tokenizer.
    """
    data = model.read_file("tokenizer.json")
    if data is None:
        raise CheckpointError(f"{model.uri} has no tokenizer.json, which text needs: put the seed's there")
    tokenizer = Tokenizer.from_str(data.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
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
    if rows < LEAST_ROWS:
        raise DataError(f"the text {source} of {name!r} is {len(tokens)} tokens: give at least {LEAST_ROWS * length}")
    return torch.tensor(tokens[: rows * length]).view(rows, length)
