"""Locks on files and folders of one machine, which the system releases when their process ends.

On a file system without locks, nobody waits and nobody is kept away.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def lock(file: int | IO[str], operation: int) -> bool:
    """Lock an open file or folder; return whether the lock was obtained.

    Args:
        file: The file or its descriptor. The lock ends when it is closed.
        operation: The operation of `fcntl.flock`.
    """
    try:
        fcntl.flock(file, operation)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on the file `path`, and yield True, or False on a file system without locks.

    The file is not removed afterwards, because a new file of the same name would be a different lock.
    """
    with path.open("w") as file:
        yield lock(file, fcntl.LOCK_EX)
