"""Tokenizers are compared by what they do, and all of their files are carried into the models that are made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

from bam_ray.blobs import open_store
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.data.tokenizer import copy_tokenizer, train_tokenizer
from bam_ray.errors import CheckpointError, UpcycleError
from bam_ray.upcycling.tokenizers import TEMPLATE_FOLDER, carried_files, check_same_tokenizer, load_tokenizer
from tests.support import tiny
from tests.support.mixture_folders import settings, upcycle_into

TEXT = ["the cat sat on the mat", "and the law of the code"]
CONFIG = LlamaConfig(**tiny.SIZES | {"vocab_size": 300})


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    """Return the folder of a tiny model with a byte-level tokenizer."""
    folder = tmp_path / "seed"
    tiny.dense(CONFIG, 0).save_pretrained(folder)
    train_tokenizer(iter(TEXT * 5), 300, folder)
    return folder


@pytest.fixture
def sentencepiece_seed(tmp_path: Path) -> Path:
    """Return the folder of a tiny model whose only tokenizer file is `tokenizer.model`."""
    folder = tmp_path / "sentencepiece"
    tiny.dense(CONFIG, 0).save_pretrained(folder)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 50), model_prefix=str(folder / "tokenizer"), vocab_size=50, model_type="bpe"
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def reader(folder: Path) -> TensorReader:
    return TensorReader(open_store(str(folder)))


def copy_of(folder: Path, name: str, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """Return a copy of a folder whose tokenizer.json is changed."""
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    if change is not None:
        path = copy / "tokenizer.json"
        plain = json.loads(path.read_text())
        change(plain)
        path.write_text(json.dumps(plain, indent=1))
    return copy


def compare(one: Path, other: Path) -> None:
    check_same_tokenizer(reader(one), one.name, reader(other), other.name)


TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.update(truncation=TRUNCATION),
        lambda plain: plain.update(post_processor=None, decoder=None),
        lambda plain: plain["model"].update(merges=[" ".join(pair) for pair in plain["model"]["merges"]]),
        lambda plain: [token.update(special=False) for token in plain["added_tokens"]],
        lambda plain: plain.update(normalizer={"type": "Sequence", "normalizers": []}),
        lambda plain: plain.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [plain["pre_tokenizer"]]}),
    ],
    ids=["truncation", "decoding", "layout of merges", "special flag", "empty normalizer", "nested pre-tokenizer"],
)
def test_files_that_differ_without_meaning_are_the_same(seed: Path, change: Callable[[Any], object]) -> None:
    compare(copy_of(seed, "branch", change), seed)


PAD = {"content": "<pad>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plain: plain.update(normalizer={"type": "Lowercase"}), "in the normalizer: all"),
        (lambda plain: plain["model"]["merges"].reverse(), "in the merges: all"),
        (lambda plain: plain["pre_tokenizer"].update(add_prefix_space=True), "in the pre tokenizer: all"),
        (lambda plain: plain["model"]["vocab"].update(a=66, b=65), "in the vocabulary ('"),
        (lambda plain: plain["added_tokens"].append({"id": 300, **PAD}), "('<pad>' is number"),
        (lambda plain: plain["added_tokens"][0].update(lstrip=True), "in the added tokens: all"),
        (lambda plain: plain.update(model={"type": "BPE"}), "cannot be compared by what they do: "),
    ],
    ids=["normalizer", "merges", "pre-tokenizer", "vocabulary", "added token", "added token's spaces", "damaged"],
)
def test_tokenizers_that_do_something_else_are_refused(seed: Path, change: Callable[[Any], object], words: str) -> None:
    with pytest.raises(UpcycleError) as caught:
        compare(copy_of(seed, "branch", change), seed)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_named(seed: Path) -> None:
    branch = copy_of(seed, "branch")
    (branch / "tokenizer.json").unlink()
    with pytest.raises(UpcycleError, match=r"branch/tokenizer\.json of 'branch' is missing"):
        compare(branch, seed)


def test_a_converted_tokenizer_is_the_same(sentencepiece_seed: Path) -> None:
    assert load_tokenizer(reader(sentencepiece_seed)).encode("the cat").tokens == ["▁the", "▁cat"]
    branch = copy_of(sentencepiece_seed, "branch")
    AutoTokenizer.from_pretrained(branch).save_pretrained(branch)
    (branch / "tokenizer.model").unlink(missing_ok=True)
    assert (branch / "tokenizer.json").exists()
    compare(branch, sentencepiece_seed)


def test_another_sentencepiece_model_is_refused(sentencepiece_seed: Path) -> None:
    branch = copy_of(sentencepiece_seed, "branch")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 50), model_prefix=str(branch / "tokenizer"), vocab_size=45, model_type="bpe"
    )
    with pytest.raises(UpcycleError, match="in the vocabulary"):
        compare(branch, sentencepiece_seed)


def test_all_files_of_a_tokenizer_reach_the_mixture(sentencepiece_seed: Path, tmp_path: Path) -> None:
    (sentencepiece_seed / "chat_template.jinja").write_text("{{ messages }}")
    (sentencepiece_seed / TEMPLATE_FOLDER).mkdir()
    (sentencepiece_seed / TEMPLATE_FOLDER / "tools.jinja").write_text("{{ tools }}")
    branch = copy_of(sentencepiece_seed, "branch")
    weights = load_file(branch / "model.safetensors")
    save_file(
        {name: each + 0.01 * torch.randn_like(each) for name, each in weights.items()}, branch / "model.safetensors"
    )
    upcycle_into(
        tmp_path / "mixture", {each.name: reader(each) for each in (sentencepiece_seed, branch)}, settings("btx")
    )
    carried = carried_files(reader(sentencepiece_seed))
    assert {"tokenizer.model", "chat_template.jinja", f"{TEMPLATE_FOLDER}/tools.jinja"} <= carried.keys()
    assert all((tmp_path / "mixture" / name).read_bytes() == data for name, data in carried.items())


def test_a_link_that_leads_outside_is_not_published(seed: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (seed / "chat_template.jinja").unlink(missing_ok=True)
    (seed / "chat_template.jinja").symlink_to("../secret")
    branch = copy_of(seed, "branch")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is a link to .*secret, outside of the folder"):
        upcycle_into(tmp_path / "mixture", {each.name: reader(each) for each in (seed, branch)}, settings("btx"))
    assert not (tmp_path / "mixture").exists()
    with pytest.raises(CheckpointError, match="outside of the folder"):
        copy_tokenizer(str(seed), tmp_path / "corpus")


def test_links_within_the_cache_of_the_hub_are_followed(seed: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--lab--seed" / "snapshots" / "0a1b"
    blobs = tmp_path / "models--lab--seed" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in seed.iterdir() if path.is_file())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert carried_files(reader(snapshot)) == carried_files(reader(seed))
