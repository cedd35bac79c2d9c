"""Exports load as transformers' own Mixtral and compute the same; what Mixtral has not is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import UpcycleError
from bam_ray.upcycling import export_mixtral
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
    models = branches(family, 3 if case in CASES else 1)
    upcycle_into(folder / "mixture", tiny.sources(folder, models), settings(case, **more))
    export_mixtral(reader(folder / "mixture"), ModelWriter(FolderStore(folder / "mixtral")), MANIFEST)
    return folder / "mixtral"


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("case", ["btx", "sparse", "split"])
@torch.no_grad()
def test_logits_are_the_mixtures(tmp_path: Path, family: str, case: str) -> None:
    folder = exported(tmp_path, family, case)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(loaded, MixtralForCausalLM)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = tiny.tokens()
    want = load(tmp_path / "mixture")(ids).logits
    torch.testing.assert_close(loaded.eval()(ids).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "case", "more", "said"),
    [
        ("llama", "bam kv_experts", {}, "attention experts \\(kv_experts\\)"),
        ("llama", "btx", {"norm_topk_prob": False}, "not renormalised"),
        ("llama", "btx", {"dense_layers": [0]}, "dense layers \\[0\\]"),
        ("qwen2", "btx", {}, "a qwen2 block"),
        ("cohere", "btx", {}, "a cohere block"),
    ],
)
def test_what_mixtral_has_not_is_refused(
    tmp_path: Path, family: str, case: str, more: dict[str, object], said: str
) -> None:
    with pytest.raises(UpcycleError, match=said):
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
    with pytest.raises(UpcycleError, match="has a shared expert, which Mixtral has not"):
        export_mixtral(reader(tmp_path / "mixture"), ModelWriter(FolderStore(tmp_path / "mixtral")), MANIFEST)
