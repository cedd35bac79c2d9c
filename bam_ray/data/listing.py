"""The files that a source names, and those of them that are skipped.

A folder, a glob, or a prefix of keys names many files, and often files that hold no text: marks of Spark jobs, metadata
of macOS, backups of editors, images. Those are skipped, and `Listing.describe_skipped` says which and why. A source
that names one file is never skipped: if its format is unknown, reading it is an error.
"""

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bam_ray.data.download import remote_files
from bam_ray.data.formats import ARROW_SUFFIX, KNOWN_FORMATS, format_of
from bam_ray.errors import DataError

HIDDEN = "hidden"
DATASETS_METADATA = ("dataset_info.json", "dataset_dict.json", "state.json")
NAMED_IN_MESSAGE = 5  # skipped files that a message names; it counts the others


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    name: str  # below the source
    fetch: Callable[[Path], Path]  # downloads the file to a folder if it is not local, and returns its path


@dataclass(frozen=True)
class Listing:
    """The files of a source to read, in order, and the names and reasons of those that are skipped."""

    files: list[SourceFile]
    skipped: list[tuple[str, str]]

    def describe_skipped(self, source: str) -> str:
        """Return one line that names the skipped files and the reasons."""
        named = [f"{name!r} ({reason})" for name, reason in self.skipped[:NAMED_IN_MESSAGE]]
        if len(self.skipped) > NAMED_IN_MESSAGE:
            named.append(f"and {len(self.skipped) - NAMED_IN_MESSAGE} more")
        total = len(self.files) + len(self.skipped)
        return f"{len(self.skipped)} of {total} files of {source} are skipped: {', '.join(named)}"


def list_files(source: str) -> Listing:
    """Return the files that a path, glob or URI names.

    Raises:
        DataError: There are none, or none of a known format.
        StoreError: The store of a URI failed.
    """
    scheme, separator, rest = source.partition("://")
    if separator and scheme != "file":
        files = [SourceFile(file.name, file.download) for file in remote_files(source)]
    else:
        try:
            files = _local_files(rest if separator else source)
        except (OSError, RuntimeError, ValueError) as error:  # no permission, an unknown ~user, a NUL in the path
            raise DataError(f"{source!r} cannot be listed ({error}): correct its `source`") from None
    if not files:
        raise DataError(f"{source or repr(source)} names no file to read: correct its `source`")
    if len(files) == 1:
        return Listing(files, [])
    of_datasets = any(format_of(file.name) == ARROW_SUFFIX for file in files)
    reasons = [_reason_to_skip(file.name, of_datasets) for file in files]
    chosen = [file for file, reason in zip(files, reasons, strict=True) if reason is None]
    skipped = [(file.name, reason) for file, reason in zip(files, reasons, strict=True) if reason is not None]
    skipped.sort(key=lambda item: item[1] == HIDDEN)  # those that may be text come first
    if not chosen:
        name, reason = skipped[0]
        raise DataError(f"{source} names no file to read: {name!r} is skipped ({reason}): use {KNOWN_FORMATS}")
    return Listing(chosen, skipped)


def _local_files(source: str) -> list[SourceFile]:
    """Return the files below a folder, one file, or the files that match a pattern."""
    if not source:
        return []
    path = Path(source).expanduser()
    if path.is_dir():
        found = [(each, each.relative_to(path).as_posix()) for each in sorted(path.rglob("*"))]
    elif path.is_file():
        found = [(path, path.name)]
    else:
        found = [(Path(each), Path(each).name) for each in glob.glob(str(path), recursive=True)]
    return [_local_file(each, name) for each, name in sorted(found) if each.is_file()]


def _local_file(path: Path, name: str) -> SourceFile:
    return SourceFile(name, lambda folder: path)


def _reason_to_skip(name: str, of_datasets: bool) -> str | None:
    """Return why a file of a folder is skipped; None if it is read. Spark and pandas hide the same names.

    `of_datasets` is True if the package `datasets` wrote the folder.
    """
    if of_datasets and PurePosixPath(name).name in DATASETS_METADATA:
        return HIDDEN
    parts = PurePosixPath(name).parts
    if any(part.startswith((".", "_")) for part in parts) or name.endswith("~"):
        return HIDDEN
    return None if format_of(name) else "unknown format"
