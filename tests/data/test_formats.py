"""Files as they are found in the wild: columns of changing types, cut archives, half characters, and huge documents."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bam_ray.data import formats
from bam_ray.data.formats import END_OF_TEXT, read_file
from bam_ray.data.sources import read_documents
from bam_ray.errors import DataError
from bam_ray.settings import DomainSettings


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def read(path: Path, field: str = "text", max_characters: int | None = None) -> list[str]:
    return list(read_file(path, field, max_characters))


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ("null", '"someone"'),
        ("1", "0.5"),
        ("[]", '["a"]'),
        ('"2024-01-01T00:00:00"', '"unknown"'),
        ('{"id": 1}', '{"id": 1, "url": "u"}'),
        ('{"id": 1}', '"id"'),
        ("[[1]]", '{"deep": [null, {"deeper": "x"}]}'),
        ('"x"', "NaN"),
        ("1", "9" * 5000),
    ],
)
def test_other_columns_may_change_their_type(early: str, late: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(3000):
            other = early if number < 2990 else late
            file.write(f'{{"other": {other}, "text": "{number} {"x" * 1000}"}}\n')
    assert [text.partition(" ")[0] for text in read(path)] == [str(number) for number in range(3000)]


def test_the_text_may_come_late_or_be_null(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"id": 1}\r\n\r\n{"text": null}\r\n{"text": "one", "id": 1}\r\n  \r\n{"text": "caf\xc3\xa9"}'
    )
    assert read(path) == ["one", "café"]


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "half \\ud83d of a pair"}\n{"text": "\\ud83c\\udf88"}\n')
    assert read(path) == ["half \ufffd of a pair", "🎈"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"text"\n', "has str in line 1: each record must be an object"),
        ('{"text": "a"}\n[1]\n', "has list in line 2"),
        ('{"text": "a"}\n{"text": 7}\n', "contains number, not text, in line 2"),
        ('{"text": {"a": "b"}}\n', "contains dict, not text, in line 1"),
        ('{"text": "a"}\n{"text": "b"]\n', "cannot be read: line 2: not JSON"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + ', "text": "a"}', "cannot be read: line 1: nested too deeply"),
        (
            "{" + ", ".join(f'"column {n}\\n": 1' for n in range(10_000)) + "}",
            r"no field 'text' \(it has column 0 , .{,250}$",
        ),
    ],
)
def test_records_without_text_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


STRINGS = pa.array(["one", None, "two"])


@pytest.mark.parametrize(
    "column",
    [
        STRINGS,
        STRINGS.cast(pa.large_string()),
        STRINGS.cast(pa.string_view()),
        STRINGS.cast(pa.binary()),
        STRINGS.dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_strings_of_every_type_are_read(column: pa.Array, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"other": [[1], None, []], "text": column}), path)
    assert read(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([["a"]]), "contains list<.*>, not text: set the domain's text_field"),
        (pa.array([1]), "contains int64, not text"),
        (pa.array([{"text": "a"}]), "contains struct<.*>, not text"),
        (pa.array([b"\xff"]), "cannot be read: UnicodeDecodeError"),
    ],
)
def test_parquet_columns_without_text_are_refused(column: pa.Array, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(DataError, match=message):
        read(path)
    with pytest.raises(DataError, match=r"no field 'body' \(it has text\)"):
        read(path, "body")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_cut_and_damaged_archives_are_named(
    name: str, suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    data = compress(b"".join(b'{"text": "%d"}\n' % (n * n) for n in range(20_000)))
    path = tmp_path / (name + suffix)
    middle = len(data) // 2
    damaged = data[:middle] + bytes(byte ^ 0x55 for byte in data[middle : middle + 64]) + data[middle + 64 :]
    for bad in (data[:-20], damaged, data[:5], b"no archive"):
        path.write_bytes(bad)
        with pytest.raises(DataError) as raised:
            read(path)
        assert str(raised.value).startswith(f"{path} ")
        assert "\n" not in str(raised.value)
    path.write_bytes(data + data)
    assert len(read(path)) == (1 if name == "a.txt" else 40_000)


@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 13, 14, 1000])
@pytest.mark.parametrize("most", [None, 4])
def test_documents_do_not_depend_on_chunks(
    chunk: int, most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["\ufeffone\r\n", "", "two <|endof", "text|>", "t", "<|endoftext", "é🎈" * 20]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + END_OF_TEXT.join(texts).encode())
    monkeypatch.setattr(formats, "CHUNK", chunk)
    assert read(path, max_characters=most) == [text[:most] for text in texts]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_document_that_is_too_large_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_CHARACTERS", 1000)
    path = tmp_path / name
    path.write_text(json.dumps({"text": "x" * 3_000_000}))
    for most in (None, 2000):
        with pytest.raises(DataError, match="more than 1,000 characters"):
            read(path, max_characters=most)


LIMITED = """
import resource, sys
from pathlib import Path
import pyarrow.parquet
from bam_ray.data.formats import read_file
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
texts = read_file(Path(sys.argv[1]), "text", int(sys.argv[2]) or None)
print(sum(len(text) for text in texts))
"""


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize(
    ("part", "most", "characters"),
    [
        ("x" * (1 << 23), 1000, 1000),
        (("x" * 1000 + END_OF_TEXT) * 8_000, 0, 64 * 8_000_000),
    ],
    ids=["one document", "many documents"],
)
def test_archives_are_read_in_bounded_memory(
    suffix: str, compress: Callable[[bytes], bytes], part: str, most: int, characters: int, tmp_path: Path
) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(part.encode()) * 64)  # half a GiB of text in less than a MiB
    command = [sys.executable, "-c", LIMITED, str(path), str(most)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, str(characters)), ended.stderr[-500:]


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(50)]
    saved = datasets.Dataset.from_dict({"text": [*texts, None], "label": list(range(51))})
    saved.save_to_disk(tmp_path / "saved", num_shards=3)
    settings = DomainSettings(source=str(tmp_path / "saved"))
    warnings: list[str] = []
    assert list(read_documents("saved", settings, warnings.append)) == texts
    assert "'dataset_info.json' (hidden)" in warnings[0]
    for field, message in (("label", "contains int64, not text"), ("body", "has no field 'body'")):
        wrong = settings.model_copy(update={"text_field": field})
        with pytest.raises(DataError, match=message):
            list(read_documents("saved", wrong))


def test_a_damaged_arrow_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.arrow").write_bytes(b"ARROW1 but not really")
    with pytest.raises(DataError, match=r"data\.arrow cannot be read"):
        list(read_documents("damaged", DomainSettings(source=str(tmp_path / "data.arrow"))))
