"""A complete corpus of little text: rows decode to the documents, parts are disjoint, errors are clear."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from bam_ray.blobs import open_store
from bam_ray.data import Corpus, build_corpus
from bam_ray.data.formats import END_OF_TEXT
from bam_ray.errors import DataError
from bam_ray.settings import DataSettings

LENGTH = 16


def document(random_words: random.Random, words: int = 60) -> str:
    return " ".join("".join(random_words.choices("abcdefgh", k=3)) for _ in range(words)) + "\n"


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    numbers = random.Random(0)
    texts = {name: [document(numbers) for _ in range(60)] for name in ("general", "law")}
    texts["law"][7] += END_OF_TEXT + " is not the end"
    # One near-duplicate with another last word, and one that shares its first half with another document
    texts["law"].append(texts["law"][3].rstrip() + " changed")
    texts["law"].append(texts["law"][4][:160] + document(numbers, 40))
    return texts


@pytest.fixture(scope="module")
def settings(texts: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    return make_settings(tmp_path_factory.mktemp("texts"), texts)


def make_settings(folder: Path, texts: dict[str, list[str]], **others: Any) -> DataSettings:
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    return DataSettings.model_validate(
        {
            "domains": {name: {"source": str(folder / f"{name}.jsonl")} for name in texts},
            "sequence_length": LENGTH,
            "held_out_fraction": 0.2,
            "tokenizer": {"vocab_size": 300},
            **others,
        }
    )


@pytest.fixture(scope="module")
def built(settings: DataSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, dict[str, Any], list[str]]:
    reports: list[str] = []
    folder = tmp_path_factory.mktemp("corpus")
    facts = build_corpus(settings, folder, reports.append)
    return Corpus(folder), facts, reports


def decoded(corpus: Corpus, rows: np.ndarray) -> list[str]:
    """Decode packed rows to documents; the last one is truncated with the last row."""
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_folder)
    ids = rows.reshape(-1)
    parts = np.split(ids, np.flatnonzero(ids == corpus.end_of_text_id) + 1)
    return [tokenizer.decode(part[part != corpus.end_of_text_id]) for part in parts if len(part)]


def test_every_document_is_in_exactly_one_part(built: Any, texts: dict[str, list[str]]) -> None:
    corpus, facts, _ = built
    for domain in corpus.domains:
        train, held_out = decoded(corpus, corpus.train(domain)), decoded(corpus, corpus.held_out(domain))
        assert corpus.train(domain).shape[1] == LENGTH
        assert not set(train) & set(held_out)
        for part in (train, held_out):
            assert set(part[:-1]) <= set(texts[domain])
            assert any(text.startswith(part[-1]) for text in texts[domain])
        counts = facts["domains"][domain]
        assert counts["train_documents"] + counts["held_out_documents"] == 60
        assert len(train) + len(held_out) in (
            58,
            59,
            60,
        )  # dropping the incomplete last row may drop a whole short document
        assert 0.17 < counts["held_out_characters"] / counts["characters"] <= 0.2


def test_near_duplicates_are_dropped_and_nothing_leaks(built: Any) -> None:
    _, facts, _ = built
    assert {name: domain["near_duplicates_dropped"] for name, domain in facts["domains"].items()} == {
        "general": 0,
        "law": 2,
    }
    assert [domain["leak"] for domain in facts["domains"].values()] == [0.0, 0.0]


def test_facts_are_written_and_match_the_rows(built: Any) -> None:
    corpus, facts, reports = built
    assert corpus.facts == facts
    assert corpus.vocab_size == 300
    assert corpus.sequence_length == LENGTH
    assert corpus.domains == ("general", "law")
    assert corpus.train("law").dtype == np.uint16
    for name, domain in facts["domains"].items():
        for part, rows in (("train", corpus.train(name)), ("held_out", corpus.held_out(name))):
            assert len(rows) == domain[f"{part}_sequences"] == domain[f"{part}_tokens"] // LENGTH
    assert reports == ["reading general", "reading law", "making the tokenizer", "tokenizing general", "tokenizing law"]


def test_the_tokenizer_loads_with_transformers(built: Any) -> None:
    corpus, _, _ = built
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_folder)
    assert len(tokenizer) == corpus.vocab_size
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        assert token == corpus.end_of_text_id
    for text in ("  Two spaces\n\tand Ünïcödé 🎈 , don't clean .", "\x00\r\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "User: Hello\n\nAssistant: Yes\n\n"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "User: Hello\n\nAssistant:"


def test_the_tokenizer_is_not_trained_on_held_out_text(tmp_path: Path) -> None:
    """A word that occurs only in held-out documents never becomes one token."""
    numbers = random.Random(1)
    # If no document fits the fraction, the smallest one is held out
    texts = {"general": [document(numbers) for _ in range(4)] + ["zyx " * 30]}
    settings = make_settings(tmp_path, texts, held_out_fraction=0.001)
    build_corpus(settings, tmp_path / "corpus", lambda _: None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "corpus" / "tokenizer")
    assert len(tokenizer("zyx").input_ids) == 3


def test_the_same_settings_give_the_same_bytes(built: Any, settings: DataSettings, tmp_path: Path) -> None:
    corpus, _, _ = built
    build_corpus(settings, tmp_path, lambda _: None)
    first = corpus.tokenizer_folder.parent
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) >= 7
    for file in files:
        assert (tmp_path / file).read_bytes() == (first / file).read_bytes(), file


def test_a_process_forked_after_a_build_can_tokenize(built: Any) -> None:
    """Threads do not survive a fork, so a child that waits for them would wait forever.

    The test forks in a separate process, because no other test may run after a fork.
    """
    corpus, _, _ = built
    program = f"""
import os, signal
from pathlib import Path
from bam_ray.data.tokenizer import threaded_tokenization, load_for_packing
tokenizer = load_for_packing(Path({str(corpus.tokenizer_folder)!r}))
with threaded_tokenization():
    tokenizer.encode_batch_fast(["a", "b"] * 100)
child = os.fork()
if child == 0:
    signal.alarm(20)
    tokenizer.encode_batch_fast(["a", "b"] * 100)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_an_existing_tokenizer_is_copied(scheme: str, built: Any, settings: DataSettings, tmp_path: Path) -> None:
    corpus, _, _ = built
    source = scheme + str(corpus.tokenizer_folder)
    if scheme == "memory://":
        source = "memory://tokenizer"
        for file in corpus.tokenizer_folder.iterdir():
            open_store(source).put_file(file.name, file)
    own = settings.tokenizer.model_copy(update={"folder": source, "vocab_size": 9999})
    facts = build_corpus(settings.model_copy(update={"tokenizer": own}), tmp_path, lambda _: None)
    assert facts == corpus.facts
    assert np.array_equal(Corpus(tmp_path).train("law"), corpus.train("law"))
    chat = [{"role": "user", "content": "Hello"}]
    kept = AutoTokenizer.from_pretrained(tmp_path / "tokenizer").apply_chat_template(chat, tokenize=False)
    assert kept == "User: Hello\n\n"


def test_build_corpus_prints_nothing(settings: DataSettings, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build_corpus(settings, tmp_path, lambda _: None)
    assert capfd.readouterr() == ("", "")


def test_max_characters_counts_only_kept_text(texts: dict[str, list[str]], tmp_path: Path) -> None:
    settings = make_settings(tmp_path, {"general": [texts["general"][0]] * 20 + texts["general"]})
    capped = {"general": {"source": settings.domains["general"].source, "max_characters": 3000}}
    settings = DataSettings.model_validate({**settings.model_dump(), "domains": capped})
    facts = build_corpus(settings, tmp_path / "corpus", lambda _: None)
    assert facts["domains"]["general"]["characters"] == 3000
    assert facts["domains"]["general"]["near_duplicates_dropped"] == 20


@pytest.mark.parametrize(
    ("documents", "others", "message"),
    [
        ([], {}, "domain general: .* contains no text"),
        (["  "], {}, "domain general: .* contains no text"),
        (["the same"] * 9, {}, "domain general has 1 document after near-duplicates"),
        (["ab", "cd", "ef"], {}, r"domain general: train has \d+ tokens, less than one sequence of 16"),
        (["some words " * 99, "ab"], {}, r"domain general: held_out has 3 tokens, less than one"),
        (["ab", "cd"], {"tokenizer": {"vocab_size": 256}}, "vocab_size is 256, but .* at least 257"),
        (["ab", "cd"], {"tokenizer": {"folder": "absent"}}, "data.tokenizer.folder absent does not exist"),
        (["ab", "cd"], {"tokenizer": {"folder": "."}}, "data.tokenizer.folder . has no tokenizer"),
    ],
)
def test_unusable_text_or_tokenizer_is_refused(
    documents: list[str], others: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as raised:
        build_corpus(make_settings(tmp_path, {"general": documents}, **others), tmp_path / "corpus", lambda _: None)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_corpus_is_refused(built: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a corpus"):
        Corpus(tmp_path)
    with pytest.raises(DataError, match="no domain 'poetry': use one of general, law"):
        built[0].train("poetry")
