"""Exports load as transformers' Mixtral with equal logits, and features that Mixtral does not have are refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import UpcycleError
from bam_ray.upcycling import export_mixtral
from bam_ray.upcycling.routers.counts import count_tokens
from tests.support import tiny
from tests.support.mixture_folders import (
    CASES,
    MANIFEST,
    SEED_ONLY_CASES,
    branches,
    load,
    reader,
    settings,
    upcycle_into,
)


def exported(folder: Path, family: str, case: str, **more: object) -> Path:
    """Export a mixture of a case, and return the folder of the export."""
    models = branches(family, 3 if case in CASES else 1)
    counts = {name: count_tokens(tiny.tokens(8, 20, seed).numpy(), 96, 1) for seed, name in enumerate(models)}
    upcycle_into(folder / "mixture", tiny.sources(folder, models), settings(case, **more), counts=counts)
    export_mixtral(reader(folder / "mixture"), ModelWriter(FolderStore(folder / "mixtral")), MANIFEST)
    return folder / "mixtral"


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    ("case", "more"), [("btx", {}), ("btx", {"embeddings": "counts"}), ("sparse", {}), ("split", {})]
)
@torch.no_grad()
def test_an_export_has_the_logits_of_the_mixture(
    tmp_path: Path, family: str, case: str, more: dict[str, object]
) -> None:
    folder = exported(tmp_path, family, case, **more)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(loaded, MixtralForCausalLM)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = tiny.tokens()
    want = load(tmp_path / "mixture")(ids).logits
    torch.testing.assert_close(loaded.eval()(ids).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "case", "more", "message"),
    [
        ("llama", "bam kv_experts", {}, "attention experts \\(kv_experts\\)"),
        ("llama", "btx", {"norm_topk_prob": False}, "not normalized"),
        ("llama", "btx", {"dense_layers": [0]}, "dense layers \\[0\\]"),
        ("qwen2", "btx", {}, "a qwen2 block"),
        ("cohere", "btx", {}, "a cohere block"),
        ("llama", "btx", {"embeddings": "experts"}, "embedding experts"),
        ("llama", "btx", {"router": {"input": "prefix"}}, "routers that read the prefix"),
        ("llama", "btx", {"router": {"init": "zero", "prior": "bigram"}}, "a router prior \\(bigram\\)"),
    ],
)
def test_unsupported_features_are_refused(
    tmp_path: Path, family: str, case: str, more: dict[str, object], message: str
) -> None:
    with pytest.raises(UpcycleError, match=message):
        exported(tmp_path, family, case, **more)
    assert not (tmp_path / "mixtral").exists()


def test_a_shared_expert_is_refused(tmp_path: Path) -> None:
    assert "split inter" in SEED_ONLY_CASES
    upcycle_into(
        tmp_path / "mixture",
        tiny.sources(tmp_path, branches(count=1)),
        settings("split inter"),
        {"general": tiny.tokens(16, 20)},
    )
    with pytest.raises(UpcycleError, match="has a shared expert, which Mixtral does not support"):
        export_mixtral(reader(tmp_path / "mixture"), ModelWriter(FolderStore(tmp_path / "mixtral")), MANIFEST)
