"""Edits of experts: the experts that stay are bit-identical, and so is their function."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import UpcycleError
from bam_ray.families import EMBEDDING_ROUTERS, PRIOR_PAIRS, PRIOR_TOKENS
from bam_ray.model import BamForCausalLM
from bam_ray.model.routing_bam import BamRouter
from bam_ray.upcycling import (
    EditOptions,
    ExpertEdit,
    add_expert,
    mixture_config_of,
    remove_expert,
    replace_expert,
    verify,
    write_edited_mixture,
)
from bam_ray.upcycling.routers.counts import TokenCounts
from tests.support import tiny
from tests.support.mixture_folders import (
    MANIFEST,
    PREFIX,
    branches,
    domain_counts,
    load,
    reader,
    settings,
    upcycle_into,
)

CASES: dict[str, dict[str, Any]] = {
    "bam kv_experts": {},
    "bam kv_shared": {},
    "btx": {},
    "embedding experts": PREFIX,
}


@pytest.fixture(params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[TensorReader, dict[str, TensorReader]]:
    """Return a mixture whose weights have changed since it was upcycled, and its sources with one more branch."""
    models = branches("qwen2", count=4)
    sources = tiny.sources(tmp_path, models)
    first = {name: sources[name] for name in ("seed", "code", "law")}
    case = "bam kv_experts" if CASES[request.param] else request.param
    upcycle_into(tmp_path / "start", first, settings(case, **CASES[request.param]), counts=domain_counts(*first))
    model = BamForCausalLM.from_pretrained(tmp_path / "start", noisy_gate=True, selection_bias=True)
    with torch.no_grad():
        for tensor in (each for each in model.state_dict().values() if each.is_floating_point()):
            tensor.add_(0.01 * torch.randn_like(tensor))
    model.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "lineage.json").write_bytes((tmp_path / "start" / "lineage.json").read_bytes())
    return reader(tmp_path / "trained"), sources


def written(
    mixture: TensorReader, edit: ExpertEdit, branch: TensorReader | None, folder: Path, weight: float | None = None
) -> BamForCausalLM:
    """Write an edited mixture, verify it and load it."""
    writer = ModelWriter(FolderStore(folder))
    counts = None if edit.branch is None else domain_counts(edit.branch)[edit.branch]
    write_edited_mixture(mixture, edit, branch, writer, MANIFEST, EditOptions(average_weight=weight, counts=counts))
    assert all(result.passed for result in verify(reader(folder)))
    return load(folder)


def stacked(model: BamForCausalLM) -> dict[str, torch.Tensor]:
    """Return the tensors that have one row per expert."""
    return {
        name: each
        for name, each in model.state_dict().items()
        if ".gate." in name or ("experts." in name and each.shape[0] == model.config.num_experts)
    }


def shared(model: BamForCausalLM) -> dict[str, torch.Tensor]:
    """Return the tensors that all experts share."""
    return {name: each for name, each in model.state_dict().items() if name not in stacked(model)}


def test_adding_does_not_change_the_other_experts(
    trained: tuple[TensorReader, dict[str, TensorReader]], tmp_path: Path
) -> None:
    mixture, sources = trained
    before = load(Path(mixture.uri))
    edit = add_expert(mixture_config_of(mixture), "medicine")
    after = written(mixture, edit, sources["medicine"], tmp_path / "out", weight=0.0)
    assert after.config.expert_names == ["seed", "code", "law", "medicine"]
    for name, old in stacked(before).items():
        assert torch.equal(stacked(after)[name][:3], old), name
    for name, old in shared(before).items():
        assert torch.equal(shared(after)[name], old), name
    down = sources["medicine"].read("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(after.model.layers[1].mlp.experts.down_proj[3], down)
    # If no router chooses it, the new expert does not change the logits
    with torch.no_grad():
        for model in (before, after) if after.config.embeddings == "experts" else ():
            model.model.embed_tokens.gate.weight.zero_()  # it reads the mean of all tables, which changes
        for module in after.modules():
            if isinstance(module, BamRouter):
                module.register_forward_hook(exclude_the_last)
        ids = tiny.tokens()
        torch.testing.assert_close(after(ids).logits, before(ids).logits, atol=1e-5, rtol=1e-5)


def exclude_the_last(module: object, inputs: object, logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits[..., :-1], torch.full_like(logits[..., -1:], -1e4)], dim=-1)


def test_adding_moves_shared_parameters_by_the_weight(
    trained: tuple[TensorReader, dict[str, TensorReader]], tmp_path: Path
) -> None:
    mixture, sources = trained
    before = load(Path(mixture.uri))
    edit = add_expert(mixture_config_of(mixture), "medicine")
    after = written(mixture, edit, sources["medicine"], tmp_path / "out")  # the weight is 1/4: one of four models
    want = 0.75 * before.model.norm.weight + 0.25 * sources["medicine"].read("model.norm.weight")
    torch.testing.assert_close(after.model.norm.weight, want)
    if before.config.attention_experts == "kv_shared":
        key = sources["medicine"].read("model.layers.0.self_attn.k_proj.weight")
        want = 0.75 * before.model.layers[0].self_attn.attention_experts.k_proj[0] + 0.25 * key
        torch.testing.assert_close(after.model.layers[0].self_attn.attention_experts.k_proj[0], want)


def test_removing_an_added_expert_restores_all_bits(
    trained: tuple[TensorReader, dict[str, TensorReader]], tmp_path: Path
) -> None:
    mixture, sources = trained
    edit = add_expert(mixture_config_of(mixture), "medicine")
    written(mixture, edit, sources["medicine"], tmp_path / "more", weight=0.0)
    more = reader(tmp_path / "more")
    again = written(more, remove_expert(mixture_config_of(more), "medicine"), None, tmp_path / "again")
    before = load(Path(mixture.uri))
    assert again.config.expert_names == before.config.expert_names
    for name, old in before.state_dict().items():
        assert torch.equal(again.state_dict()[name], old), name
    history = json.loads((tmp_path / "again" / "lineage.json").read_text())["history"]
    assert [next(iter(step)) for step in history] == ["upcycle", "absorb", "remove"]


def test_removing_keeps_all_other_experts(
    trained: tuple[TensorReader, dict[str, TensorReader]], tmp_path: Path
) -> None:
    mixture, _ = trained
    before = load(Path(mixture.uri))
    after = written(mixture, remove_expert(mixture_config_of(mixture), "code"), None, tmp_path / "out")
    for name, old in stacked(before).items():
        assert torch.equal(stacked(after)[name], old[[0, 2]]), name


def test_replacing_keeps_the_slot_and_the_router_row(
    trained: tuple[TensorReader, dict[str, TensorReader]], tmp_path: Path
) -> None:
    mixture, sources = trained
    before = load(Path(mixture.uri))
    edit = replace_expert(mixture_config_of(mixture), "code", "medicine")
    after = written(mixture, edit, sources["medicine"], tmp_path / "out")
    assert after.config.expert_names == ["seed", "medicine", "law"]
    for name, old in stacked(before).items():
        new = stacked(after)[name]
        assert torch.equal(new[[0, 2]], old[[0, 2]]), name
        assert torch.equal(new[1], old[1]) == (".gate." in name), name
    gate = sources["medicine"].read("model.layers.0.mlp.gate_proj.weight")
    assert torch.equal(after.model.layers[0].mlp.experts.gate_up_proj[1, :48], gate)


@pytest.mark.parametrize("family", ["llama", "mistral"])  # untied and tied
@pytest.mark.parametrize("prior", ["none", "bigram"])
def test_a_new_expert_has_its_tables_and_counts(tmp_path: Path, family: str, prior: str) -> None:
    sources = tiny.sources(tmp_path, branches(family, count=4))
    branch = sources.pop("medicine")
    router = {"input": "prefix", "prior": prior}
    upcycle_into(
        tmp_path / "start",
        sources,
        settings(embeddings="experts", router=router),
        counts=domain_counts(*sources) if prior != "none" else None,
    )
    start = reader(tmp_path / "start")
    added = written(start, add_expert(mixture_config_of(start), "medicine"), branch, tmp_path / "more").state_dict()
    tables = {"model.embed_tokens.experts.weight": "model.embed_tokens.weight"}
    if family == "llama":
        tables["lm_head.experts.weight"] = "lm_head.weight"
    for name, dense in tables.items():
        assert torch.equal(added[name][:3], start.read(name))
        assert torch.equal(added[name][3], branch.read(dense))
    for name in (*EMBEDDING_ROUTERS, "model.layers.1.mlp.gate.weight", "model.layers.0.self_attn.gate.weight"):
        assert torch.equal(added[name][:3], start.read(name))
        row = added[name][3]
        assert not row.any() if prior != "none" else 0.1 < row.std() < 0.3  # the initializer range is 0.2
    origins = json.loads((tmp_path / "more" / "lineage.json").read_text())["tensors"]
    if prior == "none":
        assert PRIOR_TOKENS not in added
        return
    counts = domain_counts("medicine")["medicine"]
    for name, counted in ((PRIOR_TOKENS, counts.tokens), (PRIOR_PAIRS, counts.pairs)):
        assert torch.equal(added[name][3], counted)
        assert torch.equal(added[name][:3], start.read(name)) and added[name].dtype == start.specs[name].dtype
        assert origins[name]["concat"][1] == {"new": "counted", "text_of": ["medicine"]}


def test_a_prior_needs_text_of_the_new_expert(tmp_path: Path) -> None:
    sources = tiny.sources(tmp_path, branches(count=4))
    branch = sources.pop("medicine")
    chosen = settings("btx", router={"init": "zero", "prior": "bigram"})
    upcycle_into(tmp_path / "start", sources, chosen, counts=domain_counts(*sources))
    start = reader(tmp_path / "start")
    config = mixture_config_of(start)
    empty = TokenCounts(torch.zeros(96, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64))
    other = domain_counts("medicine", vocab_size=91)["medicine"]
    missing = r"which needs text of the new expert 'medicine': give it \(--text medicine=SOURCE\)"
    for counts, message in (
        (None, missing),
        (empty, missing),
        (
            other,
            "counted with 91 tokens and 1000 buckets of pairs, but .* have 96 and 1000: count it with the tokenizer",
        ),
    ):
        for edit in (add_expert(config, "medicine"), replace_expert(config, "law", "medicine")):
            with pytest.raises(UpcycleError, match=message):
                write_edited_mixture(
                    start, edit, branch, ModelWriter(FolderStore(tmp_path / "x")), MANIFEST, EditOptions(counts=counts)
                )
    assert not (tmp_path / "x").exists()


def test_impossible_edits_are_refused(tmp_path: Path) -> None:
    sources = tiny.sources(tmp_path, branches(count=2))
    upcycle_into(tmp_path / "mixture", sources, settings())
    mixture = reader(tmp_path / "mixture")
    config = mixture_config_of(mixture)
    with pytest.raises(UpcycleError, match="has an expert 'code' already"):
        add_expert(config, "code")
    with pytest.raises(UpcycleError, match="has no expert 'law': it has seed, code"):
        remove_expert(config, "law")
    with pytest.raises(UpcycleError, match="1 experts are left without 'code', but each token uses 2"):
        remove_expert(config, "code")
    other = tiny.sources(tmp_path / "other", {"law": tiny.dense("qwen2", 5)})["law"]
    with pytest.raises(UpcycleError, match=r"in 'law' but .* in \"the mixture's seed\""):
        written(mixture, add_expert(config, "law"), other, tmp_path / "out")
    upcycle_into(tmp_path / "split", {"seed": sources["seed"]}, settings("split"))
    split = reader(tmp_path / "split")
    with pytest.raises(UpcycleError, match="its experts are slices"):
        written(split, add_expert(mixture_config_of(split), "law"), sources["code"], tmp_path / "out")
