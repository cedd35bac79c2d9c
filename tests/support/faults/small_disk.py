"""A small file system that a test can fill."""

import contextlib
import subprocess
from pathlib import Path


class SmallDisk:
    """A file system of `size` bytes, mounted on `folder` while the context lasts.

    Entering the context raises `OSError` if this process is not permitted to mount file systems.
    """

    def __init__(self, folder: Path, size: int = 48 << 20) -> None:
        self._folder, self._size = folder, size
        self._filler = folder / "filler"

    def __enter__(self) -> "SmallDisk":
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(self._folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"no file system may be mounted here: {done.stderr.strip()}")
        return self

    def __exit__(self, *exception: object) -> None:
        subprocess.run(["umount", "--lazy", str(self._folder)], check=True)

    def fill(self) -> None:
        """Write a file that takes all free space."""
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def empty(self) -> None:
        """Delete that file."""
        self._filler.unlink()
