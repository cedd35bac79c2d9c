"""A blob store in a folder: one file a key, written beside and moved into place."""

import contextlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from bam_ray.blobs.store import checked
from bam_ray.errors import BlobExists, BlobNotFound, StoreDenied, StoreError, StoreUnavailable

PARTIAL = ".partial-"  # prefix of files being written; never listed


class FolderStore:
    """A `BlobStore` over a folder, local or on a shared file system."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).expanduser().absolute()

    @property
    def uri(self) -> str:
        return str(self._folder)

    def put(self, key: str, data: bytes) -> None:
        self._write(key, lambda partial: partial.write_bytes(data), os.replace)

    def put_if_absent(self, key: str, data: bytes) -> None:
        # link(2) fails where the target exists, on every POSIX file system: that is the atomic test
        self._write(key, lambda partial: partial.write_bytes(data), os.link)

    def put_file(self, key: str, path: Path) -> None:
        self._write(key, lambda partial: shutil.copyfile(path, partial), os.replace)

    def put_stream(self, key: str, chunks: Iterator[bytes | memoryview]) -> None:
        source = _Source(chunks)

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                file.writelines(source)

        try:
            self._write(key, write, os.replace)
        except StoreError:
            if source.error is not None:  # an OSError of the source was taken for one of this folder
                raise source.error from None
            raise

    def get(self, key: str) -> bytes:
        with self._said(key):
            return self._blob(key).read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._said(key), self._blob(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def get_file(self, key: str, path: Path) -> None:
        with self._said(key):
            shutil.copyfile(self._blob(key), path)

    def size(self, key: str) -> int:
        with self._said(key):
            return self._blob(key).stat().st_size

    def exists(self, key: str) -> bool:
        with self._said(key):
            return _is_file(self._path(key))

    def list(self, prefix: str = "") -> Iterator[str]:
        # Walk only the deepest folder the prefix names
        start = self._folder / prefix.rpartition("/")[0]

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):  # nothing there: nothing to list
                raise error

        with self._said(prefix):
            keys = [
                str((Path(folder) / name).relative_to(self._folder))
                for folder, _, names in os.walk(start, onerror=fail)
                for name in names
                if not name.startswith(PARTIAL)
            ]
        yield from sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        with self._said(key), contextlib.suppress(BlobNotFound, FileNotFoundError):
            self._blob(key).unlink()

    def _path(self, key: str) -> Path:
        return self._folder / checked(key)

    def _blob(self, key: str) -> Path:
        path = self._path(key)
        if not _is_file(path):  # a folder is no blob: its name is the beginning of other keys
            raise FileNotFoundError
        return path

    def _write(self, key: str, write: Callable[[Path], object], place: Callable[[Path, Path], object]) -> None:
        path = self._path(key)
        partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
        with self._said(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write(partial)
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                place(partial, path)
            except FileExistsError:
                raise BlobExists(f"{path} exists already") from None
            finally:
                partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _said(self, key: str) -> Iterator[None]:
        """Turn the operating system's errors into the store's."""
        try:
            yield
        except FileNotFoundError:
            raise BlobNotFound(f"{self._folder / key} does not exist") from None
        except PermissionError as error:
            raise StoreDenied(f"no permission for {error.filename or self._folder}: mend its owner or mode") from None
        except OSError as error:
            raise StoreUnavailable(f"folder store {self._folder}: {error.strerror or error}") from None


class _Source:
    """Passes chunks on and keeps the error that ends them."""

    def __init__(self, chunks: Iterator[bytes | memoryview]) -> None:
        self._chunks = chunks
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[bytes | memoryview]:
        try:
            yield from self._chunks
        except Exception as error:
            self.error = error
            raise


def _is_file(path: Path) -> bool:
    """Whether a file is there; unlike `Path.is_file`, a lack of permission is an error in every version of Python."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
