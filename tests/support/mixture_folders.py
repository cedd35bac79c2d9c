"""Mixtures made from random models: a seed and branches are saved, upcycled into a folder and loaded again."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.model import BamForCausalLM
from bam_ray.settings import BranchedMixture, MixtureSettings, RoutedMixture, mixture_settings
from bam_ray.upcycling import DomainText, Upcycled, upcycle
from bam_ray.upcycling.routers.counts import TokenCounts, count_tokens
from tests.support import tiny

NAMES = ["seed", "code", "law", "medicine"]
MANIFEST = Manifest(id="mixture-0", kind=ArtifactKind.UPCYCLED, name="mixture")

BUCKETS = 1000  # of pairs; so few that several pairs of the tiny vocabulary share one
# Embedding experts, and routers that read the prefix and have a prior
PREFIX: dict[str, Any] = {
    "embeddings": "experts",
    "router": {"init": "random", "input": "prefix", "prior": "bigram"},
}
# Methods that mix a seed and branches
CASES: dict[str, dict[str, Any]] = {
    "bam kv_experts": {"method": "bam", "attention_experts": "kv_experts"},
    "bam kv_shared": {"method": "bam", "attention_experts": "kv_shared"},
    "btx": {"method": "btx"},
}
# Methods that make a dense model from a seed and branches
DENSE_CASES: dict[str, dict[str, Any]] = {
    "soup": {"method": "soup"},
    "soup ties": {"method": "soup", "average": {"how": "ties"}},
}
# Methods that make the mixture from the seed alone
SEED_ONLY_CASES: dict[str, dict[str, Any]] = {
    "sparse": {"method": "sparse", "num_experts": 4},
    "split": {"method": "split", "num_experts": 4},
    "split clustering": {"method": "split", "num_experts": 4, "split": {"construction": "clustering"}},
    "split groups": {"method": "split", "num_experts": 2, "split": {"attention": "groups"}},
    "split inner": {"method": "split", "num_experts": 4, "split": {"construction": "inner"}},
    "split inter": {"method": "split", "num_experts": 4, "split": {"construction": "inter"}},
}


def settings(case: str = "bam kv_experts", **more: Any) -> MixtureSettings:
    """Return the settings of a case, updated with `more`.

    Without `more`, routing is top-2 with normalized gates, and branches need not descend from the seed.
    """
    given = (CASES | DENSE_CASES | SEED_ONLY_CASES)[case]
    method = mixture_settings(given)
    usual: dict[str, Any] = {}
    if isinstance(method, RoutedMixture):
        usual |= {"num_experts_per_tok": 2, "norm_topk_prob": True}
    if isinstance(method, BranchedMixture):
        usual["same_seed"] = False
    return mixture_settings({**usual, **given, **more})


def upcycle_into(
    folder: Path,
    sources: dict[str, TensorReader],
    settings: MixtureSettings,
    texts: dict[str, Tensor] | None = None,
    counts: dict[str, TokenCounts] | None = None,
) -> Upcycled:
    """Upcycle `sources` and write the mixture to `folder`."""
    text = DomainText(texts or {}, counts or {})
    return upcycle(sources, settings, ModelWriter(FolderStore(folder)), MANIFEST, text=text)


def reader(folder: Path) -> TensorReader:
    """Return a reader of the tensors in `folder`."""
    return TensorReader(FolderStore(folder))


def load(folder: Path) -> BamForCausalLM:
    """Load the mixture in `folder`; every tensor must be used and none may be missing."""
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
    counts: dict[str, TokenCounts] | None = None,
) -> BamForCausalLM:
    """Return the mixture of `models`, which is written to `folder`/mixture."""
    upcycle_into(folder / "mixture", tiny.sources(folder, models), settings, texts, counts)
    return load(folder / "mixture")


def branches(family: str = "llama", count: int = 3) -> dict[str, PreTrainedModel]:
    """Return a seed and branches, `count` models in all, that differ in every weight."""
    return {name: tiny.dense(family, seed) for seed, name in enumerate(NAMES[:count])}


def domain_rows(name: str, tokens: int = 90) -> Tensor:
    """Return rows of random tokens int64 [12, 16] below `tokens`, most of which belong to the model `name`."""
    number = NAMES.index(name)
    generator = torch.Generator().manual_seed(number)
    return torch.randint(15 * number, 15 * number + tokens - 50, (12, 16), generator=generator)


def domain_counts(*names: str, vocab_size: int = 96) -> dict[str, TokenCounts]:
    """Return the counts of the `domain_rows` of each model."""
    return {name: count_tokens(domain_rows(name).numpy(), vocab_size, 1, BUCKETS) for name in names}
