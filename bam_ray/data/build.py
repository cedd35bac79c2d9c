"""The corpus of a recipe, from its sources to packed rows.

Per domain: read, drop near-duplicates, stop at `max_characters`, split by document. Then one tokenizer for all, trained
on their training parts alone. Then tokenise and pack. Text waits in a temporary file on disk, not in memory.
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

from bam_ray.data.corpus import FACTS, HELD_OUT, TOKENIZER, TRAIN
from bam_ray.data.deduplicate import MOST_SEEN, Seen, Sequences, leak, shared_fractions, word_sequences
from bam_ray.data.documents import Documents
from bam_ray.data.packing import Packed, pack, token_dtype
from bam_ray.data.sources import documents
from bam_ray.data.split import split
from bam_ray.data.tokenizer import SAMPLE_CHARACTERS, copy_tokenizer, in_threads, load_for_packing, train_tokenizer
from bam_ray.errors import DataError
from bam_ray.settings import DataSettings, DomainSettings


@dataclass(frozen=True)
class _Domain:
    """A domain that was read and split."""

    documents: Documents
    sequences: list[Sequences]  # of each document
    dropped: int
    train: NDArray[np.int64]  # indices of documents
    held_out: NDArray[np.int64]


def build_corpus(settings: DataSettings, folder: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Write the corpus of `settings` into `folder` and return its facts (see `corpus`). `note` hears what is done now.

    The same settings and sources give the same bytes. Raises `DataError`.
    """
    with tempfile.TemporaryDirectory(prefix="bam-corpus-") as temporary, ExitStack() as stack:
        domains: dict[str, _Domain] = {}
        for name, domain in settings.domains.items():
            note(f"reading {name}")
            texts = Documents(Path(temporary) / name)
            stack.callback(texts.close)
            domains[name] = _read(name, domain, settings, texts)

        stack.enter_context(in_threads())
        note("making the tokenizer")
        if settings.tokenizer.folder is not None:
            tokens = copy_tokenizer(settings.tokenizer.folder, folder / TOKENIZER)
        else:
            tokens = train_tokenizer(_sample(domains), settings.tokenizer.vocab_size, folder / TOKENIZER)
        tokenizer = load_for_packing(folder / TOKENIZER)
        dtype = token_dtype(tokens.vocab_size)

        trained_on = [part.sequences[index] for part in domains.values() for index in part.train.tolist()]
        facts: dict[str, Any] = {
            "sequence_length": settings.sequence_length,
            "vocab_size": tokens.vocab_size,
            "end_of_text_id": tokens.end_of_text_id,
            "dtype": dtype.str,
            "attend_across_documents": settings.attend_across_documents,
            "domains": {},
        }
        for name, part in domains.items():
            note(f"tokenising {name}")
            (folder / name).mkdir(parents=True, exist_ok=True)
            packed: dict[str, Packed] = {}
            for file, indices in ((TRAIN, part.train), (HELD_OUT, part.held_out)):
                texts_of_part = part.documents.texts(indices.tolist())
                packed[file] = pack(
                    texts_of_part,
                    tokenizer,
                    tokens.end_of_text_id,
                    settings.sequence_length,
                    dtype,
                    folder / name / file,
                )
                if packed[file].sequences == 0:
                    raise DataError(
                        f"domain {name}: {file.removesuffix('.bin')} has {packed[file].tokens} tokens, less than one "
                        f"sequence of {settings.sequence_length}: give more text or mend data.held_out_fraction"
                    )
            characters = part.documents.characters
            facts["domains"][name] = {
                "source": settings.domains[name].source,
                "characters": int(characters.sum()),
                "near_duplicates_dropped": part.dropped,
                "train_documents": len(part.train),
                "train_tokens": packed[TRAIN].tokens,
                "train_sequences": packed[TRAIN].sequences,
                "held_out_documents": len(part.held_out),
                "held_out_characters": int(characters[part.held_out].sum()),
                "held_out_tokens": packed[HELD_OUT].tokens,
                "held_out_sequences": packed[HELD_OUT].sequences,
                # Of the held-out 13-word sequences, the part that stands in the training part of any domain
                "leak": round(leak([part.sequences[index] for index in part.held_out.tolist()], trained_on), 6),
            }
    (folder / FACTS).write_text(json.dumps(facts, indent=1))
    return facts


def _read(name: str, domain: DomainSettings, settings: DataSettings, texts: Documents) -> _Domain:
    """Read a domain up to `max_characters` that are kept, and split it."""
    seen = Seen()
    sequences: list[Sequences] = []
    left = domain.max_characters
    dropped = 0
    for text in documents(name, domain):
        text = text[:left]
        of_text = word_sequences(text)
        if seen.fraction(of_text) > MOST_SEEN:
            dropped += 1
            continue
        seen.add(of_text)
        sequences.append(of_text)
        texts.append(text)
        if left is not None:
            left -= len(text)
            if left == 0:
                break
    if not sequences:
        raise DataError(f"domain {name}: {domain.source} holds no text")
    train, held_out = split(
        name, texts.characters, shared_fractions(sequences), settings.held_out_fraction, settings.seed
    )
    return _Domain(texts, sequences, dropped, train, held_out)


def _sample(domains: dict[str, _Domain]) -> Iterator[str]:
    """Training text for the tokenizer, the same amount of each domain where it has that much."""
    share = SAMPLE_CHARACTERS // len(domains)
    for part in domains.values():
        left = share
        for text in part.documents.texts(part.train.tolist()):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break
