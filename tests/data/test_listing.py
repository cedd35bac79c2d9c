"""Files of a folder that hold no text are skipped, and a message names them."""

from pathlib import Path

import pytest

from bam_ray.blobs import open_store
from bam_ray.data import build_corpus
from bam_ray.data.listing import list_files
from bam_ray.data.sources import read_documents
from bam_ray.errors import BamError, DataError
from bam_ray.settings import DataSettings, DomainSettings

LEFTOVERS = [
    ".DS_Store",
    "._a.jsonl",
    ".a.jsonl.crc",
    "_SUCCESS",
    "_delta_log/0.json",
    "_temporary/0/part-0.jsonl",
    ".ipynb_checkpoints/a-checkpoint.txt",
    "part/.a.txt.swp",
    "a.jsonl~",
]


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"text": "{name}"}}\n')


def read(source: object) -> tuple[list[str], list[str]]:
    warnings: list[str] = []
    return list(read_documents("law", DomainSettings(source=str(source)), warnings.append)), warnings


@pytest.mark.parametrize("name", LEFTOVERS)
def test_leftovers_are_skipped_and_named(name: str, tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", name)
    texts, warnings = read(tmp_path)
    assert texts == ["a.jsonl"]
    assert warnings == [f"domain law: 1 of 2 files of {tmp_path} are skipped: {name!r} (hidden)"]


def test_files_of_unknown_formats_are_named_first(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", *LEFTOVERS, "z.pdf", "z.csv.gz")
    texts, (warning,) = read(tmp_path)
    assert texts == ["a.jsonl"]
    assert "11 of 12 files" in warning
    assert "'z.csv.gz' (unknown format), 'z.pdf' (unknown format), '.DS_Store' (hidden)" in warning
    assert warning.endswith("and 6 more")


def test_a_folder_of_known_formats_gives_no_message(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "deep/b.ndjson")
    assert read(tmp_path) == (["a.jsonl", "deep/b.ndjson"], [])


def test_patterns_skip_what_folders_skip(tmp_path: Path) -> None:
    write(tmp_path, "_a/a.jsonl", "_a/notes.pdf", "_a/a.jsonl~")
    texts, (warning,) = read(tmp_path / "_a" / "*")
    assert texts == ["_a/a.jsonl"]
    assert "2 of 3 files" in warning


def test_a_hidden_file_is_read_if_it_is_named(tmp_path: Path) -> None:
    write(tmp_path, ".a.jsonl")
    assert read(tmp_path / ".a.jsonl") == ([".a.jsonl"], [])


def test_a_prefix_of_keys_is_treated_like_a_folder() -> None:
    store = open_store("memory://leftovers")
    for name in ("_law/a.txt", "_law/_SUCCESS", "_law/deep/.b.txt.crc", "_law/c.pdf"):
        store.put(name, b"text")
    texts, (warning,) = read("memory://leftovers/_law")
    assert texts == ["text"]
    assert "3 of 4 files" in warning
    assert "'c.pdf' (unknown format)" in warning
    assert read("memory://leftovers/_law/*")[0] == ["text"]


def test_keys_of_folders_are_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://folder-keys")
    store.put("law/a.txt", b"text")
    keys = ["law/", "law/a.txt", "law/deep/"]
    monkeypatch.setattr(type(store), "list", lambda self, prefix="": iter(keys))
    assert read("memory://folder-keys/law") == (["text"], [])
    assert read("memory://folder-keys/law/*") == (["text"], [])


@pytest.mark.parametrize("key", ["law/../../x.txt", "law//etc/x.txt", "law/./x.txt"])
def test_keys_that_lead_out_of_the_folder_are_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(open_store("memory://bad-keys")), "list", lambda self, prefix="": iter([key]))
    with pytest.raises(DataError, match="not a path below it: rename it"):
        list_files("memory://bad-keys/law")


@pytest.mark.parametrize("source", ["~nobody-of-that-name/x", "a\0b.txt", "x" * 5000, "file://", ""])
def test_impossible_paths_are_refused_in_one_line(source: str) -> None:
    with pytest.raises(BamError, match="correct its `source`") as raised:
        read(source)
    assert "\n" not in str(raised.value)


def test_a_folder_without_text_names_a_skipped_file(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "b.csv")
    with pytest.raises(DataError, match=r"names no file to read: 'a.csv' is skipped \(unknown format\): use .txt"):
        read(tmp_path)


def test_the_corpus_names_skipped_files(tmp_path: Path) -> None:
    for domain in ("general", "law"):
        (tmp_path / domain).mkdir()
        for number in range(4):
            words = " ".join(f"{domain}{number}x{word}" for word in range(60))
            (tmp_path / domain / f"{number}.txt").write_text(words)
    (tmp_path / "law" / "scan.pdf").touch()
    settings = DataSettings.model_validate(
        {
            "domains": {domain: {"source": str(tmp_path / domain)} for domain in ("general", "law")},
            "sequence_length": 8,
            "held_out_fraction": 0.3,
            "tokenizer": {"vocab_size": 300},
        }
    )
    reports: list[str] = []
    (tmp_path / "corpus").mkdir()
    facts = build_corpus(settings, tmp_path / "corpus", reports.append)
    skipped = f"domain law: 1 of 5 files of {tmp_path / 'law'} are skipped: 'scan.pdf' (unknown format)"
    assert facts["skipped"] == [skipped]
    assert reports[:2] == ["reading general", "reading law"]
    assert all(report.endswith(f"; {skipped}") for report in reports[2:])
