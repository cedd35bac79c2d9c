"""Documents are found again in the packed rows of a corpus."""

import json
import random
from pathlib import Path

import pytest

from bam_ray.data import Corpus, build_corpus, corpus_documents
from bam_ray.data.corpus_documents import CorpusDocuments
from bam_ray.settings import DataSettings


def small_corpus(folder: Path, texts: list[str]) -> Corpus:
    """Build a corpus of one domain, and return it."""
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    plain = {
        "domains": {"general": {"source": str(folder / "text.jsonl")}},
        "sequence_length": 8,
        "held_out_fraction": 0.2,
        "tokenizer": {"vocab_size": 300},
    }
    (folder / "corpus").mkdir()
    build_corpus(DataSettings.model_validate(plain), folder / "corpus", lambda note: None)
    return Corpus(folder / "corpus")


def random_text(number: int) -> str:
    """Return some random words that are those of no other text, with the end-of-text token in between."""
    words = [random.Random(f"{number} {word}").randbytes(3).hex() for word in range(15 + number)]
    return f"{number} é <|endoftext|> {' '.join(words)}"


TEXTS = [random_text(number) for number in range(30)]


@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_documents_are_those_that_were_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(corpus_documents, "CHUNK_TOKENS", chunk)
    corpus = small_corpus(tmp_path, TEXTS)
    found = []
    for held_out in (False, True):
        documents = CorpusDocuments(corpus, "general", held_out=held_out)
        *whole, last = documents.texts(range(len(documents)))
        assert any(text.startswith(last) for text in TEXTS), "the last document may lack its end"
        assert whole == sorted(whole, key=TEXTS.index)
        found += whole
        rows = corpus.held_out("general") if held_out else corpus.train("general")
        assert documents.lengths.sum() == rows.size
    assert set(found) <= set(TEXTS)
    assert len(found) == len(TEXTS) - 2


def test_the_prefix_of_a_document_has_few_tokens(tmp_path: Path) -> None:
    documents = CorpusDocuments(small_corpus(tmp_path, TEXTS), "general")
    last = len(documents) - 2
    (prefix,) = documents.texts([last], most=5)
    (whole,) = documents.texts([last])
    assert whole.startswith(prefix)
    assert len(documents.tokens(last, 5)) == 5
