"""Mixtures made in tests: seed and branches saved, upcycled into a folder, loaded as a user would."""

from pathlib import Path
from typing import Any

import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.model import BamForCausalLM
from bam_ray.settings import MixtureSettings
from bam_ray.upcycling import Upcycled, upcycle

NAMES = ["seed", "code", "law", "medicine"]
MANIFEST = Manifest(id="mixture-0", kind="upcycled", name="mixture")

CASES: dict[str, dict[str, Any]] = {
    "bam kv_experts": {"method": "bam", "attention_experts": "kv_experts"},
    "bam kv_shared": {"method": "bam", "attention_experts": "kv_shared"},
    "btx": {"method": "btx"},
}
ALONE: dict[str, dict[str, Any]] = {
    "sparse": {"method": "sparse", "num_experts": 4},
    "split": {"method": "split", "num_experts": 4},
    "split clustering": {"method": "split", "num_experts": 4, "split": {"construction": "clustering"}},
    "split groups": {"method": "split", "num_experts": 2, "split": {"attention": "groups"}},
    "split inner": {"method": "split", "num_experts": 4, "split": {"construction": "inner"}},
    "split inter": {"method": "split", "num_experts": 4, "split": {"construction": "inter"}},
}


def settings(case: str = "bam kv_experts", **more: Any) -> MixtureSettings:
    """The settings of a case, top-2 renormalised where `more` says nothing else, for models of any origin."""
    usual = {"num_experts_per_tok": 2, "norm_topk_prob": True, "same_seed": False}
    return mixture_settings({**usual, **(CASES | ALONE)[case], **more})


def make(
    folder: Path, sources: dict[str, TensorReader], settings: MixtureSettings, texts: dict[str, Tensor] | None = None
) -> Upcycled:
    """Upcycle into `folder`."""
    return upcycle(sources, settings, ModelWriter(FolderStore(folder)), MANIFEST, texts=texts)


def reader(folder: Path) -> TensorReader:
    """The model folder at `folder`."""
    return TensorReader(FolderStore(folder))


def load(folder: Path) -> BamForCausalLM:
    """The mixture in `folder`, all its tensors used and none missing."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    model: BamForCausalLM = loaded.eval()
    return model


def mixture(
    folder: Path,
    models: dict[str, PreTrainedModel],
    settings: MixtureSettings,
    texts: dict[str, Tensor] | None = None,
) -> BamForCausalLM:
    """The mixture of `models`, in `folder`/mixture."""
    make(folder / "mixture", tiny.sources(folder, models), settings, texts)
    return load(folder / "mixture")


def branches(family: str = "llama", count: int = 3) -> dict[str, PreTrainedModel]:
    """Seed and branches that differ in everything."""
    return {name: tiny.dense(family, seed) for seed, name in enumerate(NAMES[:count])}
