"""`bam init` writes recipes that `bam plan` accepts, `bam schema` prints their schema, `bam serve-key` makes keys."""

import json
from pathlib import Path

import pytest

from bam_ray.settings.api_keys import hash_api_key, read_api_keys
from tests.support import tiny
from tests.support.command_line import bam, refusal


@pytest.fixture
def seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Return a folder with a tiny Llama model and a tokenizer file."""
    folder = tmp_path / "seed"
    tiny.dense("llama", 0).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    capsys.readouterr()  # drop the progress bar of save_pretrained
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Return options that pass the text of three domains."""
    options = []
    for domain in ("general", "code", "law"):
        (tmp_path / f"{domain}.txt").write_text(f"A text about {domain}.")
        options += ["--text", f"{domain}={tmp_path / domain}.txt"]
    return options


@pytest.mark.parametrize("branches", [1, 2])
def test_plan_accepts_the_recipe_unchanged(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    seed: Path,
    texts: list[str],
    branches: int,
) -> None:
    recipe = tmp_path / "mine.yaml"
    assert bam(monkeypatch, "init", str(recipe), "--seed", str(seed), *texts[: 2 + 2 * branches]) == 0
    assert "next: bam plan" in capsys.readouterr().out
    assert bam(monkeypatch, "plan", str(recipe)) == 0
    assert "mixtures bam" in " ".join(capsys.readouterr().out.split())


def test_a_recipe_is_never_overwritten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, seed: Path, texts: list[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("mine")
    assert "exists" in refusal(monkeypatch, capsys, "init", str(recipe), "--seed", str(seed), *texts)
    assert recipe.read_text() == "mine"


def test_wrong_seeds_and_texts_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, seed: Path, texts: list[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    command = ["init", str(recipe), "--seed"]
    assert "it has no config.json" in refusal(monkeypatch, capsys, *command, str(tmp_path), *texts)
    assert "give text for 'general'" in refusal(monkeypatch, capsys, *command, str(seed), *texts[2:])
    assert "must have the form NAME=VALUE" in refusal(monkeypatch, capsys, *command, str(seed), *texts, "--text", "law")
    assert "names no file" in refusal(monkeypatch, capsys, *command, str(seed), *texts, "--text", "x=none/*.txt")
    (seed / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "gpt2" in refusal(monkeypatch, capsys, *command, str(seed), *texts)
    assert not recipe.exists()


def test_the_schema_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert bam(monkeypatch, "schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"


def test_serve_key_prints_a_key_and_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert bam(monkeypatch, "serve-key", "alice") == 0
    printed = capsys.readouterr().out
    key, line = (each.split(": ", 1)[1].strip() for each in printed.splitlines())
    (tmp_path / "keys").write_text(line)
    (entry,) = read_api_keys(str(tmp_path / "keys"))
    assert (entry.name, entry.sha256) == ("alice", hash_api_key(key.encode()))
    assert "cannot be the name of a client" in refusal(monkeypatch, capsys, "serve-key", "a b")
