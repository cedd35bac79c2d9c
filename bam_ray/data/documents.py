"""A temporary file of documents, written once and read in any order, so that a corpus may be larger than memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CHARACTERS_PER_TOKEN = 64  # so many characters of a text have at least one token


class DocumentFile:
    """Documents in one UTF-8 file, without separators; their offsets are kept in memory."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._ends = [0]
        self._characters: list[int] = []

    def append(self, text: str) -> None:
        """Add a document; all documents must be added before the first one is read."""
        self._ends.append(self._ends[-1] + self._file.write(text.encode()))
        self._characters.append(len(text))

    def close(self) -> None:
        """Close the file; no document can be read afterwards."""
        self._file.close()

    @property
    def characters(self) -> NDArray[np.int64]:
        """The length of each document in characters."""
        return np.array(self._characters, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._characters)

    def texts(self, indices: Iterable[int]) -> Iterator[str]:
        """Yield the documents at `indices`, in that order."""
        for index in indices:
            self._file.seek(self._ends[index])
            yield self._file.read(self._ends[index + 1] - self._ends[index]).decode()


@dataclass(frozen=True)
class FileDocuments:
    """Some documents of a file; their sizes are in words."""

    file: DocumentFile
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The words of each document, [n]."""
        return np.array([len(text.split()) for text in self.file.texts(self.indices.tolist())], dtype=np.int64)

    def texts(self, indices: Iterable[int], most: int | None = None) -> Iterator[str]:
        """Yield the documents at `indices`; with `most`, at least so many tokens of each."""
        end = None if most is None else most * CHARACTERS_PER_TOKEN
        for text in self.file.texts(int(self.indices[index]) for index in indices):
            yield text[:end]
