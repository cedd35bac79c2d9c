"""Embeddings whose rows are weighted by token counts equal a reference, and everything else stays an average."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.tensors import TensorSpec
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import UpcycleError
from bam_ray.families import FAMILIES, Role
from bam_ray.upcycling import add_expert, mixture_config_of, verify, write_edited_mixture
from bam_ray.upcycling.averaging import ties
from bam_ray.upcycling.expressions import RowMean, Take
from bam_ray.upcycling.routers.counts import TokenCounts, count_tokens
from tests.support import tiny
from tests.support.mixture_folders import CASES, MANIFEST, NAMES, branches, mixture, reader, settings, upcycle_into

VOCAB = tiny.SIZES["vocab_size"]
MODELS = NAMES[:3]
EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


def counts(*names: str) -> dict[str, TokenCounts]:
    """Return counts of random texts of different sizes. Each has only the tokens of its own part of the vocabulary."""
    found = {}
    for number, name in enumerate(names or MODELS):
        rng = np.random.default_rng(number)
        rows = rng.zipf(1.5, (20 * (number + 1), 10)) % 40 + 15 * number
        found[name] = count_tokens(rows, VOCAB - 5, 1)
    return found


def reference(values: list[np.ndarray[Any, Any]], tokens: list[list[int]]) -> np.ndarray[Any, Any]:
    """Return the weighted mean of embeddings, row by row."""
    mean_total = sum(map(sum, tokens)) / len(tokens)
    result = np.zeros_like(values[0], dtype=np.float64)
    for row in range(len(result)):
        seen = [each[row] * mean_total / sum(each) if row < len(each) else 0.0 for each in tokens]
        for value, count in zip(values, seen, strict=True):
            result[row] += value[row] * (count + 1) / sum(other + 1 for other in seen)
    return result


def dense_embedding(folder: Path, family: str, name: str, role: Role) -> Tensor:
    return reader(folder / name).read(FAMILIES[family].name_of(role))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "cohere"])  # the last two have tied embeddings
@pytest.mark.parametrize("case", [*CASES, "soup"])
def test_embeddings_equal_the_reference(tmp_path: Path, family: str, case: str) -> None:
    text = counts()
    upcycle_into(
        tmp_path / "out", tiny.sources(tmp_path, branches(family)), settings(case, embeddings="counts"), counts=text
    )
    tokens = [each.tokens.tolist() for each in text.values()]
    roles = [Role.EMBEDDING] if family in ("qwen3", "cohere") else [Role.EMBEDDING, Role.HEAD]
    plain = {Role.EMBEDDING: "model.embed_tokens.weight", Role.HEAD: "lm_head.weight"}
    for role in roles:
        models = [dense_embedding(tmp_path, family, name, role) for name in MODELS]
        made = reader(tmp_path / "out").read(FAMILIES[family].name_of(role) if case == "soup" else plain[role])
        expected = torch.from_numpy(reference([each.numpy() for each in models], tokens)).float()
        torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-5)
        unseen = slice(VOCAB - 5, None)
        torch.testing.assert_close(made[unseen], torch.stack(models).mean(0)[unseen])
        assert not torch.allclose(made, torch.stack(models).mean(0), atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("case", [*CASES, "soup"])
def test_identical_branches_keep_the_embedding(tmp_path: Path, family: str, case: str) -> None:
    sources = tiny.sources(tmp_path, dict.fromkeys(MODELS, tiny.dense(family, 0)))
    upcycle_into(tmp_path / "out", sources, settings(case, embeddings="counts"), counts=counts())
    name = "model.embed_tokens.weight"
    assert torch.equal(reader(tmp_path / "out").read(name), reader(tmp_path / "seed").read(name))


@pytest.mark.parametrize("average", [{"how": "ties"}, {"weights": {"seed": 0.0, "code": 3.0}}])
def test_average_applies_to_all_other_parameters(tmp_path: Path, average: dict[str, Any]) -> None:
    sources = tiny.sources(tmp_path, branches())
    made = {}
    for name, embeddings in (("plain", "averaged"), ("counts", "counts"), ("uniform", "counts")):
        more = {} if name == "uniform" else {"average": average}
        upcycle_into(tmp_path / name, sources, settings("soup", embeddings=embeddings, **more), counts=counts())
        made[name] = {each: reader(tmp_path / name).read(each) for each in sources["seed"].specs}
    for name, tensor in made["counts"].items():
        assert torch.equal(tensor, made["uniform" if name in EMBEDDINGS else "plain"][name])
        assert not torch.equal(tensor, made["plain" if name in EMBEDDINGS else "uniform"][name])
    if average.get("how") == "ties":
        seed, *others = (each.read("model.norm.weight") for each in sources.values())
        assert torch.equal(made["counts"]["model.norm.weight"], ties(seed, others, 0.2))


def test_a_mixture_verifies_and_its_lineage_has_the_counts(tmp_path: Path) -> None:
    text = counts()
    upcycle_into(
        tmp_path / "out", tiny.sources(tmp_path, branches()), settings("btx", embeddings="counts"), counts=text
    )
    assert all(check.passed for check in verify(reader(tmp_path / "out")))
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert lineage["history"][0]["upcycle"]["embeddings"] == "counts"
    origins = lineage["tensors"]
    for name in EMBEDDINGS:
        assert origins[name] == {
            "row_mean": [{"take": f"{model}:{name}"} for model in MODELS],
            "token_counts": [each.total for each in text.values()],
        }
    assert "mean" in origins["model.norm.weight"]


def test_copies_of_the_seed_do_not_add_to_its_weight(tmp_path: Path) -> None:
    sources = tiny.sources(tmp_path, branches())
    made = []
    for experts in (3, 5):
        chosen = settings("btx", embeddings="counts", num_experts=experts)
        upcycle_into(tmp_path / str(experts), sources, chosen, counts=counts())
        made.append(reader(tmp_path / str(experts)).read("lm_head.weight"))
    assert torch.equal(*made)


def test_averaged_embeddings_use_no_counts(tmp_path: Path) -> None:
    sources = tiny.sources(tmp_path, branches())
    for name, text in (("with", counts()), ("without", {})):
        upcycle_into(tmp_path / name, sources, settings("btx"), counts=text)
    one, other = (reader(tmp_path / name).read("lm_head.weight") for name in ("with", "without"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("cut", [1, 3, 7, 16, 1000])
def test_pieces_may_be_cut_anywhere(cut: int) -> None:
    class Cut:
        """Two tensors [10, 8], of which each is read in pieces of `cut` values, one more for the second."""

        specs = {"x": TensorSpec("x", torch.float32, (10, 8))}  # noqa: RUF012 (it is read only)

        def __init__(self, number: int) -> None:
            self.number = number
            self.values = torch.randn(10, 8, generator=torch.Generator().manual_seed(number))

        def chunks(self, name: str) -> Any:
            return self.values.flatten().split(cut + self.number)

    sources: Any = {"a": Cut(0), "b": Cut(1)}
    weights = torch.rand(10, generator=torch.Generator().manual_seed(2))
    mean = RowMean((Take("a", "x"), Take("b", "x")), torch.stack([weights, 1 - weights]), (1, 1))
    found = torch.cat(list(mean.pieces(sources))).view(mean.shape(sources))
    expected = weights[:, None] * sources["a"].values + (1 - weights)[:, None] * sources["b"].values
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"embeddings: counts needs text of every model, but there is none of \['seed', 'code', 'law'\]: give it"),
        (("seed", "code"), r"there is none of \['law'\]: give it \(--text NAME=SOURCE\), or leave out this setting"),
        (("seed", "code", "law", "medicine"), r"text for \['medicine'\], which are not among the models \['seed'"),
    ],
)
def test_text_of_exactly_the_models_is_needed(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    text = counts(*names) if names else {}
    with pytest.raises(UpcycleError, match=message):
        upcycle_into(
            tmp_path / "out", tiny.sources(tmp_path, branches()), settings("btx", embeddings="counts"), counts=text
        )
    assert not (tmp_path / "out").exists()


def test_an_empty_text_and_a_larger_vocabulary_are_refused(tmp_path: Path) -> None:
    sources, chosen = tiny.sources(tmp_path, branches()), settings("btx", embeddings="counts")
    empty = count_tokens(np.zeros((0, 4), np.uint16), VOCAB, 1)
    larger = count_tokens(np.full((2, 4), 3), VOCAB + 1, 1)
    for law, message in ((empty, r"none of \['law'\]"), (larger, "a vocabulary of 97 tokens, but .* only 96 rows")):
        with pytest.raises(UpcycleError, match=message):
            upcycle_into(tmp_path / "out", sources, chosen, counts={**counts(), "law": law})


def test_an_absorbed_branch_moves_all_rows_alike(tmp_path: Path) -> None:
    models = branches(count=4)
    sources = tiny.sources(tmp_path, models)
    branch = sources.pop("medicine")
    upcycle_into(tmp_path / "out", sources, settings("btx", embeddings="counts"), counts=counts())
    before = reader(tmp_path / "out")
    edit = add_expert(mixture_config_of(before), "medicine")
    write_edited_mixture(before, edit, branch, ModelWriter(FolderStore(tmp_path / "more")), MANIFEST)
    for name in EMBEDDINGS:
        expected = 0.75 * before.read(name) + 0.25 * branch.read(name)
        torch.testing.assert_close(reader(tmp_path / "more").read(name), expected)


@torch.no_grad()
def test_identical_branches_reproduce_the_logits(tmp_path: Path) -> None:
    seed = tiny.dense("llama", 0)
    chosen = settings("bam kv_experts", embeddings="counts")
    model = mixture(tmp_path, dict.fromkeys(MODELS, seed), chosen, counts=counts())
    ids = tiny.tokens()
    torch.testing.assert_close(model(ids).logits, seed(ids).logits, atol=1e-5, rtol=1e-5)
