"""The tokenizer of a model folder: its files, and the comparison of two tokenizers by what they do.

Two tokenizers are the same if they cut every text into the same numbers: equal vocabulary, merges, normalization and
added tokens. Everything else may differ, such as truncation and padding, which trainers save, special tokens that only
generation uses, and the layout of the files. If the files differ, both tokenizers are therefore loaded by transformers,
which also converts SentencePiece's `tokenizer.model`, and compared in memory.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bam_ray.checkpoint.model_folder import refuse_outside_link
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import CheckpointError, UpcycleError, one_line

TOKENIZER = "tokenizer.json"
VOCABULARY_FILES = (
    TOKENIZER,
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Files that define a tokenizer; the first one of a folder is the one that transformers reads."""
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TEMPLATE_FOLDER = "additional_chat_templates"
CARRIED = (*VOCABULARY_FILES, *SETTINGS_FILES, *TEMPLATE_FILES, "generation_config.json")
MAX_SHOWN = 40  # characters of a token or a text in an error


def is_carried(name: str) -> bool:
    """Return True if a file belongs to the tokenizer or to generation, so that it is copied from the seed."""
    return name in CARRIED or name.startswith(f"{TEMPLATE_FOLDER}/")


def carried_files(source: TensorReader) -> dict[str, bytes]:
    """Return the files of `source` that a model made from it needs too, by name.

    Raises:
        CheckpointError: A file is a pointer of Git LFS, or a link that leads out of the folder.
    """
    files = _read_files(source)
    for name in files:
        refuse_outside_link(source.store.uri, source.root, name)
    return files


def _read_files(source: TensorReader) -> dict[str, bytes]:
    read = ((name, source.read_file(name)) for name in (*CARRIED, *source.file_names(TEMPLATE_FOLDER)))
    return {name: data for name, data in read if data is not None}


def has_tokenizer(source: TensorReader) -> bool:
    """Return True if a folder has the files of a tokenizer."""
    return bool(_vocabulary(_read_files(source)))


def load_tokenizer(source: TensorReader) -> Tokenizer:
    """Return the tokenizer of a folder, without truncation and padding.

    Raises:
        CheckpointError: There is none, or transformers cannot load or convert it.
    """
    files = _read_files(source)
    if not _vocabulary(files):
        raise CheckpointError(f"{source.uri} has no {TOKENIZER}, which text needs: copy the seed's into it")
    tokenizer = _parse(source, files[TOKENIZER]) if TOKENIZER in files else _load_with_transformers(source, files)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_same_tokenizer(source: TensorReader, name: str, seed: TensorReader, seed_name: str) -> None:
    """Raise `UpcycleError` if the tokenizer of `source` cuts text into other numbers than the seed's."""
    theirs, ours = _read_files(source), _read_files(seed)
    if _vocabulary(theirs) == _vocabulary(ours):
        return
    for files, uri, owner in ((theirs, source.uri, name), (ours, seed.uri, seed_name)):
        if not _vocabulary(files):
            raise UpcycleError(
                f"{uri}/{TOKENIZER} of {owner!r} is missing, but the other model has a tokenizer: all models must have "
                "the same tokenizer"
            )
    try:
        if TOKENIZER in theirs and TOKENIZER in ours:
            different = _difference(_parse(source, theirs[TOKENIZER]), _parse(seed, ours[TOKENIZER]))
            if not different:
                return
        # The classes of transformers replace parts of tokenizer.json, so files that differ may still load alike
        different = _difference(_load_with_transformers(source, theirs), _load_with_transformers(seed, ours))
    except CheckpointError as error:
        raise UpcycleError(
            f"the tokenizer files of {name!r} differ from those of {seed_name!r}, and cannot be compared by what they "
            f"do: {error}"
        ) from None
    if different:
        raise UpcycleError(
            f"{source.uri}: the tokenizer of {name!r} differs from that of {seed_name!r} in {different}: all models "
            "must have the same tokenizer"
        )


def _parse(source: TensorReader, data: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises bare exceptions
        raise CheckpointError(f"{source.uri}/{TOKENIZER} is no tokenizer: {one_line(error)}") from None


def _vocabulary(files: Mapping[str, bytes]) -> tuple[bytes, ...]:
    """Return the content of the files that transformers reads the vocabulary from; an empty tuple if there are none."""
    if TOKENIZER in files:
        return (files[TOKENIZER],)
    return tuple(files[name] for name in VOCABULARY_FILES if name in files)


def _load_with_transformers(source: TensorReader, files: Mapping[str, bytes]) -> Tokenizer:
    """Return the tokenizer as transformers loads it from these files; code in the folder is never run."""
    from transformers import AutoTokenizer

    config = source.config.get("seed_config") or source.config
    with tempfile.TemporaryDirectory(prefix="bam-tokenizer-") as temporary:
        folder = Path(temporary)
        # The class of the tokenizer may depend on the architecture; nothing else of the configuration matters
        (folder / "config.json").write_text(json.dumps({"model_type": config.get("model_type")}))
        for name in (*VOCABULARY_FILES, *SETTINGS_FILES):
            if name in files:
                (folder / name).write_bytes(files[name])
        try:
            loaded = AutoTokenizer.from_pretrained(temporary, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # damaged files raise many types
            reason = one_line(error, all_lines=True)
            raise CheckpointError(f"transformers cannot load the tokenizer of {source.uri}: {reason}") from None
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise CheckpointError(f"{source.uri} has no fast tokenizer: save it as {TOKENIZER}")
    return tokenizer


def _difference(theirs: Tokenizer, ours: Tokenizer) -> str:
    """Return the first difference of two tokenizers for people; empty if they cut every text in the same way."""
    one, other = theirs.get_vocab(with_added_tokens=True), ours.get_vocab(with_added_tokens=True)
    for token in sorted(one.keys() | other.keys(), key=lambda token: (min(_numbers(token, one, other)), token)):
        if one.get(token) != other.get(token):
            return f"the vocabulary ({token[:MAX_SHOWN]!r} is {_number(token, one)}, not {_number(token, other)})"
    plain, plain_other = json.loads(theirs.to_str()), json.loads(ours.to_str())
    for part, normal in (("model", dict), ("added_tokens", _added), ("normalizer", _steps), ("pre_tokenizer", _steps)):
        if normal(plain[part]) != normal(plain_other[part]):
            return f"the {_part_name(part, plain, plain_other)}"
    return ""


def _numbers(token: str, *vocabularies: Mapping[str, int]) -> Iterator[int]:
    return (vocabulary[token] for vocabulary in vocabularies if token in vocabulary)


def _number(token: str, vocabulary: Mapping[str, int]) -> str:
    return f"number {vocabulary[token]}" if token in vocabulary else "missing"


def _part_name(part: str, one: dict[str, Any], other: dict[str, Any]) -> str:
    if part == "model":
        keys: list[str] = sorted(one[part].keys() | other[part].keys())
        return next(key for key in keys if one[part].get(key) != other[part].get(key))
    return part.replace("_", " ")


def _added(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return added tokens without the flag that only decoding uses."""
    return [{key: value for key, value in token.items() if key != "special"} for token in tokens]


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer as one flat list."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part.get("normalizers") or part.get("pretokenizers") or []
        return [step for each in inner for step in _steps(each)]
    return [part]
