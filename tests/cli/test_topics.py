"""`bam topics` finds the topics of bare text. A user error is one line, and nothing is written."""

import json
import random
from pathlib import Path

import pytest

from bam_ray.adapters.topics import Topics
from tests.support.command_line import bam, refusal

WORDS = {"law": "court license contract judge tax duty", "code": "function return import class pixel width"}


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, words in WORDS.items():
        draw = random.Random(name)
        lines = [json.dumps({"text": " ".join(draw.choices(words.split(), k=30))}) for _ in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))


def test_topics_of_text_are_written_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("topics", "law.jsonl", "programs=code.jsonl", "--count", "2", "--embedder", "tfidf", "--out")
    assert bam(monkeypatch, *command, "found") == 0
    output = capsys.readouterr().out
    assert "purity 100.0%, held-out accuracy 100.0%" in output
    assert "programs (100%)" in output
    assert Topics.load(tmp_path / "found").names == ("topic-0000", "topic-0001")
    assert "<h1>law, programs: topics</h1>" in (tmp_path / "found" / "topics.html").read_text()
    assert "found is not empty" in refusal(monkeypatch, capsys, *command, "found")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("law.jsonl", "--count", "some"), "count"),
        (("law.jsonl", "--count", "0"), "count"),
        (("law.jsonl", "--embedder", "bert"), "embedder"),
        (("law.jsonl", "--embedder", "seed"), "pass --embedder seed --seed FOLDER"),
        (("law.jsonl", "./law.jsonl"), "pass NAME=./law.jsonl"),
        (("missing.txt",), "names no file"),
        (("law.jsonl", "--embedder", "tfidf", "--min-documents", "100"), "provide more text or decrease it"),
    ],
)
def test_a_user_error_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert message in refusal(monkeypatch, capsys, "topics", *arguments, "--out", "found")
    assert not (tmp_path / "found").exists()
