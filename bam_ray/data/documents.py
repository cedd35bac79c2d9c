"""Documents on disk: appended once, read in any order, so that a corpus may be larger than memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Documents:
    """Texts in one file, UTF-8, end to end. `characters[i]` is the length of document i."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._ends = [0]
        self._characters: list[int] = []

    def append(self, text: str) -> None:
        """Add a document; all must be added before the first is read."""
        self._ends.append(self._ends[-1] + self._file.write(text.encode()))
        self._characters.append(len(text))

    def close(self) -> None:
        """Close the file; nothing can be read any more."""
        self._file.close()

    @property
    def characters(self) -> NDArray[np.int64]:
        """Length of each document."""
        return np.array(self._characters, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._characters)

    def texts(self, indices: Iterable[int]) -> Iterator[str]:
        """The documents at `indices`, in their order."""
        for index in indices:
            self._file.seek(self._ends[index])
            yield self._file.read(self._ends[index + 1] - self._ends[index]).decode()
