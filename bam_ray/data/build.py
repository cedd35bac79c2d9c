"""Building the corpus of a recipe, from its sources to packed rows of tokens.

For each domain: read its documents, drop near-duplicates, stop at `max_characters`, and split by document. Then train
one tokenizer for all domains, only on their training parts, or copy an existing one. Then tokenize and pack.

The text is kept in a temporary file on disk between these steps, so a corpus may be larger than memory.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bam_ray.data.corpus import FACTS, HELD_OUT, TOKENIZER, TRAIN
from bam_ray.data.deduplicate import (
    MAX_SEEN_FRACTION,
    NGramHashes,
    NGramSet,
    leaked_fraction,
    ngram_hashes,
    shared_fractions,
)
from bam_ray.data.documents import DocumentFile
from bam_ray.data.packing import PackedFile, pack_documents, token_dtype
from bam_ray.data.sources import read_documents
from bam_ray.data.split import split_documents
from bam_ray.data.tokenizer import (
    SAMPLE_CHARACTERS,
    TokenizerInfo,
    copy_tokenizer,
    load_for_packing,
    threaded_tokenization,
    train_tokenizer,
)
from bam_ray.errors import DataError
from bam_ray.settings import DataSettings


@dataclass(frozen=True)
class _SplitDomain:
    """The documents of a domain that were kept, and their split."""

    documents: DocumentFile
    ngrams: list[NGramHashes]  # per document
    dropped: int
    train: NDArray[np.int64]  # indices of documents
    held_out: NDArray[np.int64]

    def ngrams_of(self, indices: NDArray[np.int64]) -> list[NGramHashes]:
        return [self.ngrams[index] for index in indices.tolist()]


def build_corpus(settings: DataSettings, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Write the corpus of `settings` to `folder`; the same settings and sources give the same bytes.

    Args:
        settings: The domains, the tokenizer and the sequence length.
        folder: An existing folder.
        report: A function that is called with a short text at the start of each step, and the skipped files so far.

    Returns:
        The facts that are also written to `corpus.json` (see `corpus`).

    Raises:
        DataError: A source cannot be read or has too little text, or the tokenizer cannot be made.
    """
    skipped: list[str] = []

    def note(text: str) -> None:
        report("; ".join([text, *skipped]))

    with tempfile.TemporaryDirectory(prefix="bam-corpus-") as temporary, ExitStack() as stack:
        domains: dict[str, _SplitDomain] = {}
        for name in settings.domains:
            note(f"reading {name}")
            documents = DocumentFile(Path(temporary) / name)
            stack.callback(documents.close)
            domains[name] = _read_domain(name, settings, documents, skipped.append)

        stack.enter_context(threaded_tokenization())
        note("making the tokenizer")
        tokens = _make_tokenizer(settings, domains, folder / TOKENIZER)
        tokenizer = load_for_packing(folder / TOKENIZER)
        packed: dict[str, dict[str, PackedFile]] = {}
        for name, split in domains.items():
            note(f"tokenizing {name}")
            packed[name] = _pack_domain(name, split, settings, tokenizer, tokens, folder)
        facts = _corpus_facts(settings, tokens, domains, packed) | ({"skipped": skipped} if skipped else {})
    (folder / FACTS).write_text(json.dumps(facts, indent=1))
    return facts


def _read_domain(
    name: str, settings: DataSettings, documents: DocumentFile, warn: Callable[[str], object]
) -> _SplitDomain:
    """Read a domain until `max_characters` are kept, and split it. `warn` is called if files are skipped."""
    domain = settings.domains[name]
    seen = NGramSet()
    ngrams: list[NGramHashes] = []
    left = domain.max_characters
    dropped = 0
    for document in read_documents(name, domain, warn):
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
    if not ngrams:
        raise DataError(f"domain {name}: {domain.source} contains no text: name another source")
    train, held_out = split_documents(
        name, documents.characters, shared_fractions(ngrams), settings.held_out_fraction, settings.seed
    )
    return _SplitDomain(documents, ngrams, dropped, train, held_out)


def _make_tokenizer(settings: DataSettings, domains: dict[str, _SplitDomain], folder: Path) -> TokenizerInfo:
    if settings.tokenizer.folder is not None:
        return copy_tokenizer(settings.tokenizer.folder, folder)
    return train_tokenizer(_tokenizer_sample(domains), settings.tokenizer.vocab_size, folder)


def _tokenizer_sample(domains: dict[str, _SplitDomain]) -> Iterator[str]:
    """Yield training text for the tokenizer, equally many characters of each domain that has that many."""
    share = SAMPLE_CHARACTERS // len(domains)
    for split in domains.values():
        left = share
        for text in split.documents.texts(split.train.tolist()):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def _pack_domain(
    name: str,
    split: _SplitDomain,
    settings: DataSettings,
    tokenizer: Tokenizer,
    tokens: TokenizerInfo,
    folder: Path,
) -> dict[str, PackedFile]:
    """Tokenize and pack both parts of a domain and return what each file contains, by file name."""
    dtype = token_dtype(tokens.vocab_size)
    (folder / name).mkdir(parents=True, exist_ok=True)
    packed: dict[str, PackedFile] = {}
    for file, indices in ((TRAIN, split.train), (HELD_OUT, split.held_out)):
        texts = split.documents.texts(indices.tolist())
        path = folder / name / file
        packed[file] = pack_documents(texts, tokenizer, tokens.end_of_text_id, settings.sequence_length, dtype, path)
        if packed[file].sequences == 0:
            raise DataError(
                f"domain {name}: {path.stem} has {packed[file].tokens} tokens, less than one sequence of "
                f"{settings.sequence_length}: provide more text or change data.held_out_fraction"
            )
    return packed


def _corpus_facts(
    settings: DataSettings,
    tokens: TokenizerInfo,
    domains: dict[str, _SplitDomain],
    packed: dict[str, dict[str, PackedFile]],
) -> dict[str, Any]:
    """Return the content of `corpus.json`."""
    train_ngrams = [hashes for split in domains.values() for hashes in split.ngrams_of(split.train)]
    return {
        "sequence_length": settings.sequence_length,
        "vocab_size": tokens.vocab_size,
        "end_of_text_id": tokens.end_of_text_id,
        "dtype": token_dtype(tokens.vocab_size).str,
        "attend_across_documents": settings.attend_across_documents,
        "domains": {
            name: _domain_facts(settings.domains[name].source, split, packed[name], train_ngrams)
            for name, split in domains.items()
        },
    }


def _domain_facts(
    source: str, split: _SplitDomain, packed: dict[str, PackedFile], train_ngrams: list[NGramHashes]
) -> dict[str, Any]:
    """Return what `corpus.json` says of one domain; `train_ngrams` are those of the training parts of all domains."""
    characters = split.documents.characters
    return {
        "source": source,
        "characters": int(characters.sum()),
        "near_duplicates_dropped": split.dropped,
        "train_documents": len(split.train),
        "train_tokens": packed[TRAIN].tokens,
        "train_sequences": packed[TRAIN].sequences,
        "held_out_documents": len(split.held_out),
        "held_out_characters": int(characters[split.held_out].sum()),
        "held_out_tokens": packed[HELD_OUT].tokens,
        "held_out_sequences": packed[HELD_OUT].sequences,
        # the fraction of the held-out 13-grams that also occur in the training part of any domain
        "leak": round(leaked_fraction(split.ngrams_of(split.held_out), train_ngrams), 6),
    }
