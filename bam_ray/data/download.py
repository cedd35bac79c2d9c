"""Downloads of the files that a URI names, through the blob stores."""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from bam_ray.blobs import open_store
from bam_ray.errors import DataError


def download_files(uri: str, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """Download the files that `uri` names into `folder`, one after the other, and yield their paths.

    The names below the URI are kept.

    Args:
        uri: A key, a pattern (in which `*` also matches `/`), or a prefix of keys.
        folder: The folder to download to.
        wanted: A filter on keys below a prefix.

    Raises:
        DataError: The URI names no file.
        StoreError: The store failed.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, path = rest.rstrip("/").partition("/")
    store = open_store(f"{scheme}://{bucket}")
    pattern_start = min((path.find(mark) for mark in "*?[" if mark in path), default=len(path))
    keys = list(store.list(path[:pattern_start]))
    below = f"{path}/" if path else ""
    chosen = [key for key in keys if key == path or fnmatchcase(key, path)]
    chosen = chosen or [key for key in keys if key.startswith(below) and wanted(key)]
    if not chosen:
        raise DataError(f"{uri} names no file to read: correct the URI or upload the files")
    for key in chosen:
        target = folder / (key.removeprefix(below) if key.startswith(below) else PurePosixPath(key).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        store.get_file(key, target)
        yield target
