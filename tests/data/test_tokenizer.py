"""Tokenizer folders that cannot be used are refused in one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bam_ray.data.tokenizer import copy_tokenizer, train_tokenizer
from bam_ray.errors import BamError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts: Iterator[str] = iter(["the cat sat on the mat"] * 3)
    train_tokenizer(texts, 300, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain["model"].update(type="OfANewVersion"),
        lambda plain: plain.update(pre_tokenizer={"type": "OfANewVersion"}),
        lambda plain: plain["model"].pop("vocab"),
        lambda plain: plain.update(model=7),
        lambda plain: plain.clear(),
    ],
)
def test_tokenizers_of_other_versions_are_refused(
    change: Callable[[dict[str, Any]], object], folder: Path, tmp_path: Path
) -> None:
    edit(folder / "tokenizer.json", change)
    with pytest.raises(DataError, match="has no tokenizer that loads") as raised:
        copy_tokenizer(str(folder), tmp_path / "copy")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["model_max_length", "clean_up_tokenization_spaces"])
def test_settings_that_cannot_be_saved_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda plain: plain.update({name: "\ud800"}))
    with pytest.raises(
        DataError, match=r"cannot be saved: UnicodeEncodeError: .* is damaged, so copy it again$"
    ) as raised:
        copy_tokenizer(str(folder), tmp_path / "copy")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("source", ["~nobody-of-that-name/x", "absent", "s3://", "file://absent"])
def test_missing_tokenizer_folders_are_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(BamError):
        copy_tokenizer(source, tmp_path / "copy")


def test_gaps_between_ids_count_as_tokens(folder: Path, tmp_path: Path) -> None:
    def leave_a_gap(plain: dict[str, Any]) -> None:
        plain["added_tokens"].append({**plain["added_tokens"][0], "id": 400, "content": "<|late|>"})
        plain["model"]["vocab"]["<|late|>"] = 400

    before = copy_tokenizer(str(folder), tmp_path / "whole")
    edit(folder / "tokenizer.json", leave_a_gap)
    assert before.vocab_size < 300
    assert copy_tokenizer(str(folder), tmp_path / "copy").vocab_size == 401
