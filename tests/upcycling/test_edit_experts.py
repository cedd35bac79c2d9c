"""Edits of experts: the experts that stay are bit-identical, and so is their function."""

import json
from pathlib import Path

import pytest
import torch

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import UpcycleError
from bam_ray.model import BamForCausalLM
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
from tests.support import tiny
from tests.support.mixture_folders import MANIFEST, branches, load, reader, settings, upcycle_into


@pytest.fixture(params=["bam kv_experts", "bam kv_shared", "btx"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[TensorReader, dict[str, TensorReader]]:
    """Return a mixture whose weights have changed since it was upcycled, and its sources with one more branch."""
    models = branches(request.param and "qwen2", count=4)
    sources = tiny.sources(tmp_path, models)
    first = {name: sources[name] for name in ("seed", "code", "law")}
    upcycle_into(tmp_path / "start", first, settings(request.param))
    model = BamForCausalLM.from_pretrained(tmp_path / "start", noisy_gate=True, selection_bias=True)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.01 * torch.randn_like(tensor))
    model.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "lineage.json").write_bytes((tmp_path / "start" / "lineage.json").read_bytes())
    return reader(tmp_path / "trained"), sources


def written(
    mixture: TensorReader, edit: ExpertEdit, branch: TensorReader | None, folder: Path, weight: float | None = None
) -> BamForCausalLM:
    """Write an edited mixture, verify it and load it."""
    writer = ModelWriter(FolderStore(folder))
    write_edited_mixture(mixture, edit, branch, writer, MANIFEST, EditOptions(average_weight=weight))
    assert all(result.passed for result in verify(reader(folder)))
    return load(folder)


def stacked(model: BamForCausalLM) -> dict[str, torch.Tensor]:
    """Return the tensors that have one row per expert."""
    return {
        name: each
        for name, each in model.state_dict().items()
        if ".gate." in name or (".experts." in name and each.shape[0] == model.config.num_experts)
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
        for layer in after.model.layers:
            layer.mlp.gate.register_forward_hook(exclude_the_last)
            if hasattr(layer.self_attn, "gate"):
                layer.self_attn.gate.register_forward_hook(exclude_the_last)
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
        want = 0.75 * before.model.layers[0].self_attn.experts.k_proj[0] + 0.25 * key
        torch.testing.assert_close(after.model.layers[0].self_attn.experts.k_proj[0], want)


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
