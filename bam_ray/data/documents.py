"""A temporary file of documents, written once and read in any order, so that a corpus may be larger than memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


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
