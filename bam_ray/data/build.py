"""Building the corpus of a recipe, from its sources to packed rows of tokens.

For each domain: read its documents, drop near-duplicates, stop at `max_characters`, and split by document. Text without
labels is clustered into domains (see `split_text`). Then train one tokenizer for all domains, only on their training
parts, or copy an existing one. Then tokenize and pack.

The text is kept in a temporary file on disk between these steps, so a corpus may be larger than memory.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.data.corpus import FACTS, HELD_OUT, TOKENIZER, TRAIN
from bam_ray.data.deduplicate import NGramHashes, leaked_fraction
from bam_ray.data.documents import DocumentFile
from bam_ray.data.packing import PackedFile, pack_documents, token_dtype
from bam_ray.data.split_text import Discover, SplitText, UnlabeledText, read_domain
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


def build_corpus(
    settings: DataSettings, folder: Path, report: Callable[[str], None], discover: Discover | None = None
) -> dict[str, Any]:
    """Write the corpus of `settings` to `folder`; the same settings and sources give the same bytes.

    Args:
        settings: The domains, the tokenizer and the sequence length.
        folder: An existing folder.
        report: A function that is called with a short text at the start of each step, and the skipped files so far.
        discover: The function that clusters text without labels, which `settings.discover` needs.

    Returns:
        The facts that are also written to `corpus.json` (see `corpus`).

    Raises:
        DataError: A source cannot be read or has too little text, or the tokenizer cannot be made.
    """
    skipped: list[str] = []

    def note(text: str) -> None:
        report("; ".join([text, *skipped]))

    with scratch_folder("corpus") as temporary, ExitStack() as stack:
        domains, discovered = _read_domains(settings, temporary, stack, discover, note, skipped)
        stack.enter_context(threaded_tokenization())
        note("making the tokenizer")
        tokens = _make_tokenizer(settings, domains, folder / TOKENIZER)
        tokenizer = load_for_packing(folder / TOKENIZER)
        packed: dict[str, dict[str, PackedFile]] = {}
        for name, split in domains.items():
            note(f"tokenizing {name}")
            packed[name] = _pack_domain(name, split, settings, tokenizer, tokens, folder)
        facts = _corpus_facts(settings, tokens, domains, packed) | discovered
        facts |= {"skipped": skipped} if skipped else {}
    (folder / FACTS).write_text(json.dumps(facts, indent=1))
    return facts


def _read_domains(
    settings: DataSettings,
    folder: Path,
    stack: ExitStack,
    discover: Discover | None,
    note: Callable[[str], None],
    skipped: list[str],
) -> tuple[dict[str, SplitText], dict[str, Any]]:
    """Return the split text of all domains, and facts of the text without labels. The files are closed by `stack`."""

    def new_file(name: str) -> DocumentFile:
        return stack.enter_context(closing(DocumentFile(folder / name)))

    domains: dict[str, SplitText] = {}
    for name in settings.domains:
        note(f"reading {name}")
        domains[name] = read_domain(name, settings, new_file(name), skipped.append)
    if settings.discover is None:
        return domains, {}
    assert discover is not None, "the recipe has text without labels"
    text = UnlabeledText(settings, new_file("+unlabeled"), skipped.append, lambda source: note(f"reading {source}"))
    note("discovering domains")
    found, facts = text.domains(discover)
    domains |= found
    return {name: domains[name] for name in settings.names}, {"discovered": facts}


def _make_tokenizer(settings: DataSettings, domains: dict[str, SplitText], folder: Path) -> TokenizerInfo:
    if settings.tokenizer.folder is not None:
        return copy_tokenizer(settings.tokenizer.folder, folder)
    return train_tokenizer(_tokenizer_sample(domains), settings.tokenizer.vocab_size, folder)


def _tokenizer_sample(domains: dict[str, SplitText]) -> Iterator[str]:
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
    split: SplitText,
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
    domains: dict[str, SplitText],
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
        "domains": {name: _domain_facts(split, packed[name], train_ngrams) for name, split in domains.items()},
    }


def _domain_facts(split: SplitText, packed: dict[str, PackedFile], train_ngrams: list[NGramHashes]) -> dict[str, Any]:
    """Return what `corpus.json` says of one domain; `train_ngrams` are those of the training parts of all domains."""
    return {
        **split.facts,
        "characters": split.characters,
        "train_documents": len(split.train),
        "train_tokens": packed[TRAIN].tokens,
        "train_sequences": packed[TRAIN].sequences,
        "held_out_documents": len(split.held_out),
        "held_out_characters": int(split.documents.characters[split.held_out].sum()),
        "held_out_tokens": packed[HELD_OUT].tokens,
        "held_out_sequences": packed[HELD_OUT].sequences,
        # the fraction of the held-out 13-grams that also occur in the training part of any domain
        "leak": round(leaked_fraction(split.ngrams_of(split.held_out), train_ngrams), 6),
    }
