"""The token counts of a corpus: the corpus stage writes them beside the text, and other stages read them."""

from collections.abc import Callable, Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bam_ray.data import Corpus
from bam_ray.errors import CheckpointError
from bam_ray.upcycling.routers.counts import TokenCounts, count_tokens

COUNTS = "counts.safetensors"
"""The name of the file in the corpus's folder, with the tensors `<domain>.tokens` and `<domain>.pairs`."""


def write_token_counts(folder: Path, note: Callable[[str], None]) -> None:
    """Count the training rows of every domain of the corpus in `folder`, and write the counts to `COUNTS` there.

    Args:
        folder: The folder of the corpus.
        note: A function that is called with a short text before each domain.
    """
    corpus = Corpus(folder)
    tensors = {}
    for domain in corpus.domains:
        note(f"counting the tokens of {domain}")
        counts = _count(corpus, domain)
        tensors[f"{domain}.tokens"], tensors[f"{domain}.pairs"] = counts.tokens, counts.pairs
    save_file(tensors, folder / COUNTS)


def read_token_counts(folder: Path, domains: Collection[str]) -> dict[str, TokenCounts]:
    """Return the counts of the training rows of `domains`, of the corpus in `folder`.

    A corpus of an earlier version has no counts. Its rows are counted here.

    Raises:
        CheckpointError: The file with the counts is damaged, or has no counts of a domain.
    """
    path = folder / COUNTS
    if not path.exists():
        corpus = Corpus(folder)
        return {domain: _count(corpus, domain) for domain in domains}
    try:
        with safe_open(path, framework="pt") as file:
            return {
                domain: TokenCounts(file.get_tensor(f"{domain}.tokens"), file.get_tensor(f"{domain}.pairs"))
                for domain in domains
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): make the corpus again") from None


def _count(corpus: Corpus, domain: str) -> TokenCounts:
    return count_tokens(corpus.train(domain), corpus.vocab_size, corpus.end_of_text_id)
