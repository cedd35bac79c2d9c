"""tf-idf of words, reduced by a singular value decomposition (latent semantic analysis), as in c-BTM (2303.14177).

The whole embedder is one vector for each word: the vector of a text is the sum of those of its words, each with the
weight `1 + log(count)`. Inverse document frequencies are part of the vectors.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import log
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from bam_ray.errors import CheckpointError, DataError

WORDS_FILE, VECTORS_FILE = "words.json", "words.safetensors"
DIMENSION = 100
MAX_WORDS = 50_000

_word = re.compile(r"\w\w+")


@dataclass(frozen=True)
class TfidfTable:
    """The vector of each word: `words` [V] and `vectors` [V, d], float32."""

    words: tuple[str, ...]
    vectors: Tensor

    @cached_property
    def digest(self) -> str:
        """The SHA-256 digest of the words and their vectors."""
        digest = hashlib.sha256("\n".join(self.words).encode())
        digest.update(self.vectors.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    def embed(self, texts: Sequence[str], prefix_words: int) -> Tensor:
        """Return the vectors of texts, [n, d], of length 1, or 0 for a text without known words."""
        ids: list[int] = []
        weights: list[float] = []
        starts: list[int] = []
        for text in texts:
            starts.append(len(ids))
            for word, count in Counter(first_words(text, prefix_words)).items():
                if (index := self._index.get(word)) is not None:
                    ids.append(index)
                    weights.append(1.0 + log(count))
        sums = F.embedding_bag(
            torch.tensor(ids, dtype=torch.int64),
            self.vectors,
            torch.tensor(starts, dtype=torch.int64),
            mode="sum",
            per_sample_weights=torch.tensor(weights, dtype=torch.float32),
        )
        return F.normalize(sums, dim=-1)

    def save(self, folder: Path) -> None:
        """Write the table to an existing folder."""
        (folder / WORDS_FILE).write_text(json.dumps(self.words))
        save_file({"vectors": self.vectors}, folder / VECTORS_FILE)

    @staticmethod
    def load(folder: Path) -> "TfidfTable":
        """Read the table in a folder; raises `CheckpointError` if there is none."""
        try:
            words = json.loads((folder / WORDS_FILE).read_text())
            return TfidfTable(tuple(words), load_file(folder / VECTORS_FILE)["vectors"])
        except (OSError, ValueError, KeyError, SafetensorError):
            raise CheckpointError(
                f"{folder} lacks the words of the embedder tfidf, or they are damaged: make the topics again"
            ) from None


def first_words(text: str, count: int) -> Iterable[str]:
    """Yield the first words of a text, in lower case."""
    return (match.group().casefold() for match in islice(_word.finditer(text), count))


def fit_tfidf(texts: Iterable[str], prefix_words: int, seed: int) -> TfidfTable:
    """Fit the vectors of words to texts; the result depends only on the texts, the prefix and the seed.

    Raises:
        DataError: The texts have fewer than three different words.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        analyzer=lambda text: first_words(text, prefix_words),
        sublinear_tf=True,
        max_features=MAX_WORDS,
        dtype=np.float32,
    )
    try:
        matrix = vectorizer.fit_transform(texts)  # sparse, [n, V]
    except ValueError:  # no words
        matrix = None
    if matrix is None or min(matrix.shape) < 3:
        raise DataError("the text has too few documents or words for the embedder tfidf: provide more text")
    svd = TruncatedSVD(min(DIMENSION, min(matrix.shape) - 1), random_state=seed).fit(matrix)
    vectors = svd.components_.T * vectorizer.idf_[:, None]
    return TfidfTable(tuple(vectorizer.get_feature_names_out()), torch.from_numpy(vectors.astype(np.float32)))
