"""The text of one file: plain text, JSON records or Parquet, compressed or not.

Every format is read as a stream. A document is the only part of a file that must fit in memory, and it may have at
most `MAX_CHARACTERS` characters, so a small compressed file that expands to a huge one cannot exhaust the memory.

Only the field with the text is looked at. Other fields may have any type, which may change from record to record.
"""

import bz2
import gzip
import io
import lzma
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from bam_ray.data.json_values import json_values
from bam_ray.errors import DataError, encodable, one_line

END_OF_TEXT = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
PARQUET_SUFFIX = ".parquet"
ARROW_SUFFIX = ".arrow"  # the files of `datasets.Dataset.save_to_disk`


def _open_plain(path: Path) -> Any:
    return path.open("rb")


def _open_zstd(path: Path) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, PARQUET_SUFFIX, ARROW_SUFFIX)
KNOWN_FORMATS = f"{', '.join(SUFFIXES)}, or {', '.join(COMPRESSIONS)} of these"
MAX_CHARACTERS = 1 << 27
"""The most characters of one document. Comparing such a document with others takes a few GiB of memory."""
CHUNK = 1 << 20  # characters that are read from a text file at once
PARQUET_ROWS = 256  # rows of a Parquet file that are decoded at once
MAX_NAMED_CHARACTERS = 200  # of the names of fields in an error


def format_of(name: str) -> str | None:
    """Return the suffix that decides how a file is read, in lower case and without the compression; None: unknown."""
    suffix = PurePosixPath(_without_compression(name)).suffix.lower()
    return suffix if suffix in SUFFIXES else None


def read_file(path: Path, field: str, max_characters: int | None) -> Iterator[str]:
    """Yield the documents of a file.

    Args:
        path: A file of a known format.
        field: The JSON field or Parquet column that holds the text.
        max_characters: The most characters of a document, which ends there; None means no limit.

    Raises:
        DataError: The file cannot be read, or a document is larger than `MAX_CHARACTERS`.
    """
    suffix = format_of(path.name)
    compressed = _without_compression(path.name) != path.name
    if suffix is None:
        raise DataError(f"{path} has an unknown suffix: use {KNOWN_FORMATS}")
    if suffix in (PARQUET_SUFFIX, ARROW_SUFFIX):
        if compressed:
            raise DataError(f"{path} is a compressed {suffix} file, which cannot be read: decompress it")
        texts = (_parquet_texts if suffix == PARQUET_SUFFIX else _arrow_texts)(path, field)
    elif suffix in TEXT_SUFFIXES:
        texts = _plain_texts(path, max_characters)
    else:
        texts = _json_texts(path, field)
    for text in texts:
        yield encodable(text[:max_characters])


def _without_compression(name: str) -> str:
    compression = PurePosixPath(name).suffix
    return name.removesuffix(compression) if compression.lower() in COMPRESSIONS else name


def _open_text(path: Path) -> io.TextIOWrapper:
    """Open a file as UTF-8 text with its own line ends, decompressed as its name says."""
    open_bytes = COMPRESSIONS.get(path.suffix.lower(), _open_plain)
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="")


class _GrowingDocument:
    """A document that is read in parts, and whose end is cut off."""

    def __init__(self, path: Path, max_characters: int | None) -> None:
        self._path = path
        self._kept = MAX_CHARACTERS + 1 if max_characters is None else min(max_characters, MAX_CHARACTERS + 1)
        self._parts: list[str] = []
        self._length = 0  # of the parts

    def add(self, text: str) -> None:
        part = text[: self._kept - self._length]
        self._parts.append(part)
        self._length += len(part)
        if self._length > MAX_CHARACTERS:
            raise DataError(
                f"{self._path} contains a document of more than {MAX_CHARACTERS:,} characters: separate its documents "
                f"by {END_OF_TEXT}, or set the domain's max_characters"
            )

    def end(self, text: str) -> str:
        """Add the last part and return the document. The next part begins another one."""
        self.add(text)
        document = "".join(self._parts)
        self._parts, self._length = [], 0
        return document


@contextmanager
def _errors_of(path: Path, what: str = "cannot be read") -> Iterator[None]:
    """Convert the errors of the libraries that read files to one line that names the file."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = str(error) if type(error) is ValueError else one_line(error, all_lines=True)
        raise DataError(f"{path} {what}: {reason}") from None


def _plain_texts(path: Path, max_characters: int | None) -> Iterator[str]:
    document = _GrowingDocument(path, max_characters)
    end = ""  # the end of the last chunk, in which END_OF_TEXT may begin
    with _errors_of(path, "is not readable as UTF-8 text"), _open_text(path) as file:
        while chunk := file.read(CHUNK):
            *documents, rest = (end + chunk).split(END_OF_TEXT)
            for text in documents:
                yield document.end(text)
            document.add(rest[: 1 - len(END_OF_TEXT)])
            end = rest[1 - len(END_OF_TEXT) :]
    yield document.end(end)


def _json_texts(path: Path, field: str) -> Iterator[str]:
    """Yield one field of each record. Records without it, or in which it is null, are skipped, but not all of them."""
    other_fields: list[str] | None = None
    found = False
    with _errors_of(path), _open_text(path) as file:
        for line, record in json_values(file, MAX_CHARACTERS):
            if not isinstance(record, dict):
                raise DataError(f"{path} has {_kind(record)} in line {line}: each record must be an object with text")
            text = record.get(field)
            if isinstance(text, str):
                yield text
            elif text is not None:
                raise DataError(
                    f"field {field!r} of {path} contains {_kind(text)}, not text, in line {line}: set the domain's "
                    "text_field"
                )
            found = found or field in record
            other_fields = list(record) if other_fields is None else other_fields
    if other_fields is not None and not found:
        raise _no_field(path, field, other_fields)


def _kind(value: Any) -> str:
    return "number" if isinstance(value, float) else type(value).__name__


def _no_field(path: Path, field: str, others: list[str]) -> DataError:
    named = textwrap.shorten(", ".join(others), MAX_NAMED_CHARACTERS)
    return DataError(f"{path} has no field {field!r} (it has {named}): set the domain's text_field")


def _parquet_texts(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Without the buffer for whole row groups, which may be larger than memory
        with _errors_of(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK) as file:
            _check_column(path, field, file.schema_arrow)
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field]):
                yield from _column_texts(batch.column(0).to_pylist())
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read: {one_line(error, all_lines=True)}") from None


def _arrow_texts(path: Path, field: str) -> Iterator[str]:
    import datasets
    import pyarrow as pa

    try:
        with _errors_of(path):
            rows = datasets.Dataset.from_file(str(path))  # mapped into memory, not read
            _check_column(path, field, rows.data.schema)
            yield from _column_texts(row[field] for row in rows.select_columns([field]))
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read: {one_line(error, all_lines=True)}") from None


def _check_column(path: Path, field: str, schema: Any) -> None:
    """Raise `DataError` unless an Arrow schema has a column of text with the name `field`."""
    if field not in schema.names:
        raise _no_field(path, field, schema.names)
    kind = schema.field(field).type
    if not _holds_text(kind):
        raise DataError(f"field {field!r} of {path} contains {kind}, not text: set the domain's text_field")


def _column_texts(values: Iterable[str | bytes | None]) -> Iterator[str]:
    """Yield the values of a column without nulls."""
    for value in values:
        if value is not None:
            yield value.decode() if isinstance(value, bytes) else value


def _holds_text(kind: Any) -> bool:
    """Return True if an Arrow type stores strings, in any form. Some writers store them as bytes."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    names = ("null", "string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(types, f"is_{name}")(kind) for name in names)
