"""A blob store in a folder: one file per key, written under a temporary name and then moved into place."""

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from bam_ray.blobs.store import sort_keys, validate_key
from bam_ray.errors import BlobExists, BlobNotFound, StoreDenied, StoreError, StoreUnavailable

PARTIAL = ".partial-"  # prefix of files that are being written; they are never listed
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}  # answers of file systems such as exFAT to link(2)


class FolderStore:
    """A `BlobStore` in a folder on a local disk or a shared file system."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(os.path.expanduser(folder)).absolute()  # an unknown ~user is kept

    @property
    def uri(self) -> str:
        """The absolute path of the folder."""
        return str(self._folder)

    def put(self, key: str, data: bytes) -> None:
        """Write `data` to a temporary file and rename it to `key`."""
        self._write(key, lambda partial: partial.write_bytes(data), os.replace)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write `data` to a temporary file and hard-link it to `key`; raise `BlobExists` if the key exists.

        link(2) fails if the target exists, on every POSIX file system, which makes the test atomic. A network file
        system may repeat a link whose answer was lost. It then fails although the link exists, so both files are
        compared.
        """
        self._write(key, lambda partial: partial.write_bytes(data), _link)

    def put_file(self, key: str, path: Path) -> None:
        """Copy the file at `path` to a temporary file and rename it to `key`."""
        self._write(key, lambda partial: shutil.copyfile(path, partial), os.replace)

    def put_stream(self, key: str, chunks: Iterator[bytes | memoryview], size: int | None = None) -> None:
        """Write `chunks` to a temporary file and rename it to `key`."""
        recorder = _ErrorRecorder(chunks)

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                file.writelines(recorder)

        try:
            self._write(key, write, os.replace)
        except StoreError:
            if recorder.error is not None:  # an OSError of the producer was mistaken for one of this folder
                raise recorder.error from None
            raise

    def get(self, key: str) -> bytes:
        """Return all bytes of `key`; raise `BlobNotFound` if it does not exist."""
        with self._translated_errors(key):
            return self._existing_file(key).read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return bytes [start, start + length) of `key`."""
        with self._translated_errors(key), self._existing_file(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def get_file(self, key: str, path: Path) -> None:
        """Copy the file of `key` to `path`."""
        with self._translated_errors(key):
            shutil.copyfile(self._existing_file(key), path)

    def size(self, key: str) -> int:
        """Return the length of the file of `key` in bytes."""
        with self._translated_errors(key):
            return self._existing_file(key).stat().st_size

    def exists(self, key: str) -> bool:
        """Return True if `key` has a file; a folder of that name is not a blob."""
        with self._translated_errors(key):
            return _is_file(self._path(key))

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield all keys that begin with `prefix`, sorted; folders that cannot hold such keys are not walked."""
        with self._translated_errors(prefix):
            names = [name for name in self._names(prefix) if not _is_partial(name)]
        yield from sort_keys(names)

    def delete(self, key: str) -> None:
        """Remove the file of `key`; do nothing if it does not exist."""
        with self._translated_errors(key), contextlib.suppress(BlobNotFound, FileNotFoundError):
            self._existing_file(key).unlink()

    def abort_uploads(self, prefix: str, older_than: timedelta) -> Sequence[str]:
        """Remove the temporary files below `prefix` that nobody has written to for that long."""
        removed = []
        with self._translated_errors(prefix):
            for name in filter(_is_partial, self._names(prefix)):
                with contextlib.suppress(FileNotFoundError):  # its writer was faster
                    path = self._folder / name
                    if time.time() - path.stat().st_mtime >= older_than.total_seconds():
                        path.unlink()
                        removed.append(name)
        return sort_keys(removed)

    def _names(self, prefix: str) -> Iterator[str]:
        """Yield the names of all files that begin with `prefix`, relative to the folder of the store."""

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):  # a missing folder holds no keys
                raise error

        parent, _, beginning = prefix.rpartition("/")
        start = self._folder / parent
        for folder, subfolders, names in os.walk(start, onerror=fail):
            if Path(folder) == start:
                subfolders[:] = [name for name in subfolders if name.startswith(beginning)]
            for name in names:
                path = str((Path(folder) / name).relative_to(self._folder))
                if path.startswith(prefix):
                    yield path

    def _path(self, key: str) -> Path:
        return self._folder / validate_key(key)

    def _existing_file(self, key: str) -> Path:
        path = self._path(key)
        if not _is_file(path):  # a folder is not a blob: its name is the prefix of other keys
            raise FileNotFoundError
        return path

    def _write(self, key: str, write: Callable[[Path], object], publish: Callable[[Path, Path], object]) -> None:
        """Write a temporary file next to the file of `key`, flush it to disk and publish it under the key."""
        path = self._path(key)
        partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
        with self._translated_errors(key):
            _make_folder(path.parent)
            try:
                write(partial)
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                publish(partial, path)
                sync(path.parent)
            except FileExistsError:
                raise BlobExists(f"{path} exists already") from None
            finally:
                partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _translated_errors(self, key: str) -> Iterator[None]:
        """Translate the operating system's errors into store errors."""
        try:
            yield
        except FileNotFoundError:
            raise BlobNotFound(f"{self._folder / key} does not exist") from None
        except PermissionError as error:
            raise StoreDenied(f"no permission for {error.filename or self._folder}: fix its owner or mode") from None
        except FileExistsError as error:  # a file is where a folder must be
            raise StoreUnavailable(f"folder store {self._folder}: Not a directory: {error.filename}") from None
        except OSError as error:
            raise StoreUnavailable(f"folder store {self._folder}: {error.strerror or error}") from None


class _ErrorRecorder:
    """An iterator over chunks that records the exception that ended it."""

    def __init__(self, chunks: Iterator[bytes | memoryview]) -> None:
        self._chunks = chunks
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[bytes | memoryview]:
        try:
            yield from self._chunks
        except Exception as error:
            self.error = error
            raise


def _is_partial(name: str) -> bool:
    return name.rpartition("/")[2].startswith(PARTIAL)


def _make_folder(folder: Path) -> None:
    """Create a folder and those above it, and write their names to disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, to disk. Without this, a power failure may undo a rename or a link."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # files can be created in a folder that cannot be read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do this
            raise
    finally:
        os.close(descriptor)


def _link(partial: Path, path: Path) -> None:
    """Link `path` to the file `partial`; raise `FileExistsError` if another file exists there."""
    try:
        os.link(partial, path)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):  # it was deleted in the meantime
            if os.path.samefile(partial, path):
                return
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        raise StoreError(
            f"the file system of {path.parent} has no hard links, which commits need ({error.strerror}): use a folder "
            "on another file system, or S3"
        ) from None


def _is_file(path: Path) -> bool:
    """Return True if `path` is a file; raise `PermissionError` if it cannot be examined.

    `Path.is_file` hides a lack of permission in some versions of Python.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
