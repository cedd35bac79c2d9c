"""The token counts of a corpus: the corpus stage writes them beside the text, and other stages read them."""

from collections.abc import Callable, Collection
from pathlib import Path

from bam_ray.data import Corpus
from bam_ray.upcycling.routers.counts import COUNTS, TokenCounts, count_tokens, read_counts, write_counts


def write_token_counts(folder: Path, note: Callable[[str], None]) -> None:
    """Count the training rows of every domain of the corpus in `folder`, and write the counts to `COUNTS` there.

    Args:
        folder: The folder of the corpus.
        note: A function that is called with a short text before each domain.
    """
    corpus = Corpus(folder)
    counts = {}
    for domain in corpus.domains:
        note(f"counting the tokens of {domain}")
        counts[domain] = _count(corpus, domain)
    write_counts(folder / COUNTS, counts)


def read_token_counts(folder: Path, domains: Collection[str]) -> dict[str, TokenCounts]:
    """Return the counts of the training rows of `domains`, of the corpus in `folder`.

    A corpus of an earlier version has no counts. Its rows are counted here.

    Raises:
        CheckpointError: The file with the counts is damaged.
    """
    if (folder / COUNTS).exists():
        return read_counts(folder / COUNTS, domains)
    corpus = Corpus(folder)
    return {domain: _count(corpus, domain) for domain in domains}


def _count(corpus: Corpus, domain: str) -> TokenCounts:
    return count_tokens(corpus.train(domain), corpus.vocab_size, corpus.end_of_text_id)
