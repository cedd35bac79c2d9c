"""A folder of adapters in the format of peft, as a source for the server."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from bam_ray.adapters.peft_folder import CONFIG, WEIGHTS, read_peft_folder
from bam_ray.adapters.source import AdapterKey
from bam_ray.adapters.weights import AdapterWeights
from bam_ray.errors import CheckpointError

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class PeftFolders:
    """A folder with one peft folder for each adapter, whose name is that of its folder.

    Folders with other characters in their names than letters, digits, `.`, `_` and `-` are left out, because names are
    in headers of responses.
    """

    tier = "disk"

    def __init__(self, root: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Create a source.

        Args:
            root: The folder that has the folders of the adapters.
            shapes: The shape [out, in] of each linear layer of the base model, by name.

        Raises:
            CheckpointError: The folder does not exist.
        """
        self._root, self._shapes = root, shapes
        self.keys()

    def keys(self) -> Mapping[str, AdapterKey]:
        """Return the folders that have both files of an adapter."""
        try:
            folders = [each for each in self._root.iterdir() if NAME.fullmatch(each.name)]
        except OSError as error:
            raise CheckpointError(
                f"{self._root} cannot be read ({error.strerror}): set serve.adapters.source to a folder of adapters"
            ) from None
        keys = (self._key(folder) for folder in sorted(folders))
        return {key.name: key for key in keys if key is not None}

    def fetch(self, key: AdapterKey) -> AdapterWeights:
        """Return the weights of an adapter."""
        weights = read_peft_folder(self._root / key.name, key.name, self._shapes).weights
        if self._key(self._root / key.name) != key:
            raise CheckpointError(f"adapter {key.name} has changed while it was read: retry")
        return weights

    def _key(self, folder: Path) -> AdapterKey | None:
        """Return the key of an adapter, or None if a file is missing, as while it is being written."""
        try:
            files = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
        except OSError:
            return None
        stamp = repr([(each.st_mtime_ns, each.st_size, each.st_ino) for each in files])
        return AdapterKey(folder.name, hashlib.sha256(stamp.encode()).hexdigest()[:12])
