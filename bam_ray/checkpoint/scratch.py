"""Temporary folders below TMPDIR, which do not outlive the process that made them by long.

Problem: an attempt may be killed while it writes a model or a checkpoint to TMPDIR. Nothing would ever delete that
folder, so a node on which attempts are often killed would run out of disk space.

Design choice: a process keeps a lock on each of its folders, which the system releases when the process ends. Whoever
makes a folder first deletes the folders beside it that nobody has locked.

Limits: on a file system without locks, folders of killed processes stay. If several machines share TMPDIR, its locks
must work between them.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bam_ray.checkpoint.locks import lock

PREFIX = "bam-scratch-"
_NAME = re.compile(rf"{PREFIX}[a-z]+-\w{{8}}")

_held: dict[Path, int] = {}  # the descriptors of the locked folders of this process


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Yield a new folder below TMPDIR, which is deleted at the end of the block (see `new_scratch_folder`)."""
    folder = new_scratch_folder(purpose)
    try:
        yield folder
    finally:
        remove_scratch_folder(folder)


def new_scratch_folder(purpose: str) -> Path:
    """Make a folder below TMPDIR and lock it, after deleting the folders that killed processes have left there.

    Args:
        purpose: A word of lowercase letters, which is a part of the folder's name.
    """
    sweep_scratch_folders()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-"))
        with contextlib.suppress(FileNotFoundError):  # another process may sweep it before it is locked
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            lock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                _held[folder] = descriptor
                return folder
            os.close(descriptor)


def remove_scratch_folder(folder: Path) -> None:
    """Delete a folder of this process and release its lock."""
    shutil.rmtree(folder, ignore_errors=True)
    descriptor = _held.pop(folder, None)
    if descriptor is not None:
        os.close(descriptor)


def sweep_scratch_folders() -> None:
    """Delete the folders that nobody has locked; those of other users are left alone."""
    with os.scandir(tempfile.gettempdir()) as entries:
        found = [Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name)]
    for folder in found:
        with contextlib.suppress(OSError):  # another process may sweep at the same time
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid() and lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
