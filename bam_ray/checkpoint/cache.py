"""The local cache of fetched artifacts: one folder per artifact and content, shared by the processes of a node.

Problem: a node may crash, or its disk may fill up, while an artifact is downloaded. The cache must not grow for ever,
and a folder must not disappear while a process reads it.

Design choice: files are written to a temporary folder, flushed to the disk, verified and renamed. A mark beside the
folder records the length and the modification time of each file. A folder that does not match its mark is downloaded
again. Every process keeps a shared lock on each folder that it has fetched. To make room, the folders that were used
least recently are deleted, except those that are locked.

`BAM_CACHE` names the folder of the cache, and `BAM_CACHE_GIB` limits its size (by default, the free space does).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from bam_ray.blobs.folder import sync
from bam_ray.checkpoint.locks import file_lock, lock
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.errors import StoreError
from bam_ray.units import GIB

MARK = ".mark.json"
LOCK = ".lock"  # held exclusively while a folder is downloaded or deleted
READERS = ".readers"  # shared by the processes that read a folder

_held: dict[Path, IO[str]] = {}  # the open `READERS` of the folders that this process reads

DownloadFile = Callable[[str, Path], None]
"""Downloads the file of a name to a path, and verifies it."""


def cache_folder() -> Path:
    """Return the folder for fetched artifacts: `$BAM_CACHE`, by default `~/.cache/bam_ray`."""
    return Path(os.environ.get("BAM_CACHE") or "~/.cache/bam_ray").expanduser()


def cached_folder(uri: str, manifest: Manifest, download: DownloadFile, cache: Path | None = None) -> Path:
    """Return the folder with the files of `manifest`, which is downloaded if it is not in the cache.

    If several processes fetch the same folder, as the ranks of a node do, one of them downloads and the others wait.

    Args:
        uri: The URI of the artifact.
        manifest: The manifest of the artifact.
        download: Downloads one file.
        cache: The folder of the cache; None stands for `cache_folder()`.

    Raises:
        StoreError: The disk of the cache has too little space.
    """
    # The manifest is part of the key, because a store that was wiped and filled again has another artifact
    digest = hashlib.sha256(uri.encode() + manifest.to_bytes()).hexdigest()[:16]
    folder = (cache or cache_folder()) / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(_beside(folder, LOCK)) as locked:
        if not _is_intact(folder):
            shutil.rmtree(folder, ignore_errors=True)
            if locked:
                _sweep_partial(folder)
            _make_room(folder.parent, sum(entry.size for entry in manifest.files.values()), uri)
            _download(folder, manifest, download)
        os.utime(folder)
        _hold(folder)
    return folder


def _download(folder: Path, manifest: Manifest, download: DownloadFile) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        for name in manifest.files:
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            download(name, path)
            sync(path)
        for each in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
            sync(each)
        mark = _beside(folder, MARK)
        mark.write_text(json.dumps(_facts(partial)))
        sync(mark)
        with contextlib.suppress(OSError):  # without locks another process may be first; both copies are equal
            partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_intact(folder: Path) -> bool:
    """Return True if the folder exists and its files are those that were downloaded."""
    try:
        expected = json.loads(_beside(folder, MARK).read_text())
    except (OSError, ValueError):
        return False
    return folder.is_dir() and _facts(folder) == expected


def _facts(folder: Path) -> dict[str, list[int]]:
    """Return the length and the modification time of each file."""
    files = {str(path.relative_to(folder)): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}


def _make_room(cache: Path, needed: int, uri: str) -> None:
    """Delete the folders that were used least recently until `needed` bytes fit; raises `StoreError` if they do not."""
    folders = sorted((path for path in cache.iterdir() if _beside(path, MARK).exists()), key=_last_use)
    sizes = {folder: sum(size for size, _ in _facts(folder).values()) for folder in folders}
    limit = float(os.environ.get("BAM_CACHE_GIB") or "inf") * GIB
    for folder in folders:
        if needed <= shutil.disk_usage(cache).free and sum(sizes.values()) + needed <= limit:
            break
        if _evict(folder):
            del sizes[folder]
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise StoreError(f"{cache} has {free:,} bytes free but {uri} needs {needed:,}: free space or set BAM_CACHE")


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # evicted by another process
        return 0.0


def _evict(folder: Path) -> bool:
    """Delete a folder unless a process reads or downloads it; return whether it is deleted."""
    with _beside(folder, LOCK).open("w") as download, _beside(folder, READERS).open("w") as readers:
        if not all(lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) for file in (download, readers)):
            return False
        shutil.rmtree(folder, ignore_errors=True)
        _beside(folder, MARK).unlink(missing_ok=True)
        _sweep_partial(folder)
        return True


def _sweep_partial(folder: Path) -> None:
    """Delete what processes that were killed while they downloaded `folder` have left; needs the lock."""
    for partial in folder.parent.glob(f".{folder.name}.partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _hold(folder: Path) -> None:
    """Keep a shared lock on the folder until this process ends."""
    if folder not in _held:
        _held[folder] = _beside(folder, READERS).open("w")
        lock(_held[folder], fcntl.LOCK_SH | fcntl.LOCK_NB)


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}{ending}")
