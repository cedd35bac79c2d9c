"""The files that a URI names, listed and downloaded through the blob stores."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from bam_ray.blobs import BlobStore, open_store
from bam_ray.errors import DataError


@dataclass(frozen=True)
class RemoteFile:
    """One file that a URI names."""

    store: BlobStore
    key: str
    name: str  # below the URI

    def download(self, folder: Path) -> Path:
        """Download the file to `folder`, under its name, and return its path."""
        target = folder / self.name
        target.parent.mkdir(parents=True, exist_ok=True)
        self.store.get_file(self.key, target)
        return target


def remote_files(uri: str) -> list[RemoteFile]:
    """Return the files that `uri` names: a key, a pattern (in which `*` also matches `/`), or a prefix of keys.

    Keys that end in `/`, which web consoles write to show folders, are no files.

    Raises:
        DataError: The name of a file is not a relative path.
        StoreError: The store failed.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, path = rest.rstrip("/").partition("/")
    store = open_store(f"{scheme}://{bucket}")
    pattern_start = min((path.find(mark) for mark in "*?[" if mark in path), default=len(path))
    keys = [key for key in store.list(path[:pattern_start]) if not key.endswith("/")]
    below = f"{path}/" if path else ""
    matching = [key for key in keys if key == path or fnmatchcase(key, path)]
    if matching:
        return [RemoteFile(store, key, PurePosixPath(key).name) for key in matching]
    files = [RemoteFile(store, key, key.removeprefix(below)) for key in keys if key.startswith(below)]
    for file in files:
        if any(part in ("", ".", "..") for part in file.name.split("/")):
            raise DataError(f"{uri} contains the key {file.key!r}, which is not a path below it: rename it")
    return files
