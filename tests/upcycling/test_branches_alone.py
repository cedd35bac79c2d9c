"""Mixtures whose experts are the branches alone: the seed gives only tokenizer, configuration and dtypes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import SettingsError, UpcycleError
from bam_ray.model import BamForCausalLM
from bam_ray.settings import mixture_settings
from bam_ray.upcycling import (
    ExpertEdit,
    add_expert,
    export_mixtral,
    mixture_config_of,
    remove_expert,
    replace_expert,
    verify,
    write_edited_mixture,
)
from bam_ray.upcycling.averaging import ties
from tests.support import tiny
from tests.support.mixture_folders import CASES, MANIFEST, branches, load, mixture, reader, settings, upcycle_into


def assert_verified(folder: Path) -> None:
    found = {result.name: result for result in verify(reader(folder))}
    assert {"files", "lineage", "one expert alone", "order"} <= found.keys()
    assert all(result.passed for result in found.values()), found


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("case", CASES)
def test_the_branches_of_every_family_are_the_experts(tmp_path: Path, family: str, case: str) -> None:
    sources = tiny.sources(tmp_path, branches(family))
    upcycled = upcycle_into(tmp_path / "mixture", sources, settings(case, seed_expert=False))
    assert upcycled.experts == ("code", "law")
    assert_verified(tmp_path / "mixture")
    without_seed = {"code": sources["code"], "law": sources["law"]}
    upcycle_into(tmp_path / "other", without_seed, settings(case))  # the first branch in the seed's place
    one, other = reader(tmp_path / "mixture"), reader(tmp_path / "other")
    assert one.specs == other.specs
    for name in one.specs:
        assert torch.equal(one.read(name), other.read(name)), name


@torch.no_grad()
def test_the_seed_is_not_averaged_but_ties_starts_from_it(tmp_path: Path) -> None:
    models = branches()
    sources = tiny.sources(tmp_path, models)
    seed, code, law = (models[name].model.norm.weight for name in ("seed", "code", "law"))
    for name, average, want in (
        ("mean", {}, (code + law) / 2),
        ("weighted", {"weights": {"code": 3.0}}, (3 * code + law) / 4),
        ("ties", {"how": "ties", "density": 0.5}, ties(seed, [code, law], 0.5)),
    ):
        upcycle_into(tmp_path / name, sources, settings("btx", seed_expert=False, average=average))
        torch.testing.assert_close(load(tmp_path / name).model.norm.weight, want)


def test_a_soup_of_the_branches_alone(tmp_path: Path) -> None:
    upcycle_into(tmp_path / "soup", tiny.sources(tmp_path, branches()), settings("soup", seed_expert=False))
    soup, code, law = (reader(tmp_path / name) for name in ("soup", "code", "law"))
    for name in soup.specs:
        torch.testing.assert_close(soup.read(name), (code.read(name) + law.read(name)) / 2)
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "# A weight average of code, law\n" in card
    assert list(json.loads((tmp_path / "soup" / "lineage.json").read_text())["sources"]) == ["seed", "code", "law"]


def test_the_folder_has_the_dtype_and_lineage_of_the_seed(tmp_path: Path) -> None:
    models = branches()
    models["seed"] = models["seed"].bfloat16()
    upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, models), settings(seed_expert=False))
    model = load(tmp_path / "mixture")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.seed_config["dtype"] == "bfloat16"
    lineage = json.loads((tmp_path / "mixture" / "lineage.json").read_text())
    assert list(lineage["sources"]) == ["seed", "code", "law"]
    assert lineage["history"][0]["upcycle"]["seed_expert"] is False
    assert "seed:" not in json.dumps(lineage["tensors"])
    assert "# A mixture of 2 experts: code, law" in (tmp_path / "mixture" / "README.md").read_text()


@pytest.fixture(params=CASES)
def mixed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[TensorReader, dict[str, TensorReader]]:
    """Return a mixture of two branches, and its sources with one more branch."""
    sources = tiny.sources(tmp_path, branches(count=4))
    first = {name: sources[name] for name in ("seed", "code", "law")}
    chosen = settings(request.param, seed_expert=False, num_experts_per_tok=1)
    upcycle_into(tmp_path / "mixture", first, chosen)
    return reader(tmp_path / "mixture"), sources


def edited(mixture: TensorReader, edit: ExpertEdit, branch: TensorReader | None, folder: Path) -> BamForCausalLM:
    write_edited_mixture(mixture, edit, branch, ModelWriter(FolderStore(folder)), MANIFEST)
    assert_verified(folder)
    return load(folder)


def test_experts_are_added_removed_and_replaced(
    mixed: tuple[TensorReader, dict[str, TensorReader]], tmp_path: Path
) -> None:
    mixture, sources = mixed
    down = {name: sources[name].read("model.layers.1.mlp.down_proj.weight") for name in ("code", "law", "medicine")}

    def check(model: BamForCausalLM, names: list[str]) -> None:
        assert model.config.expert_names == names
        experts = model.model.layers[1].mlp.experts.down_proj
        assert len(experts) == len(names)
        assert all(torch.equal(expert, down[name]) for name, expert in zip(names, experts, strict=True))

    edit = add_expert(mixture_config_of(mixture), "medicine")
    check(edited(mixture, edit, sources["medicine"], tmp_path / "more"), ["code", "law", "medicine"])
    more = reader(tmp_path / "more")
    check(edited(more, remove_expert(mixture_config_of(more), "code"), None, tmp_path / "less"), ["law", "medicine"])
    edit = replace_expert(mixture_config_of(mixture), "code", "medicine")
    check(edited(mixture, edit, sources["medicine"], tmp_path / "other"), ["medicine", "law"])


def test_a_mixture_without_the_seed_can_be_exported(tmp_path: Path) -> None:
    models = branches()
    model = mixture(tmp_path, models, settings("btx", seed_expert=False))
    exported = export_mixtral(reader(tmp_path / "mixture"), ModelWriter(FolderStore(tmp_path / "mixtral")), MANIFEST)
    assert exported.num_local_experts == model.config.num_experts == 2


def test_routers_are_fitted_to_the_text_of_the_branches(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = {
        name: torch.randint(2 + 4 * number, 6 + 4 * number, (8, 16), generator=generator)
        for number, name in enumerate(("seed", "code", "law"))
    }
    sources, chosen = tiny.sources(tmp_path, branches()), settings(seed_expert=False, router={"init": "ridge"})
    with pytest.raises(UpcycleError, match=r"text for 'seed', but no such expert: use names of \['code', 'law'\]"):
        upcycle_into(tmp_path / "wrong", sources, chosen, texts)
    del texts["seed"]
    separation = upcycle_into(tmp_path / "mixture", sources, chosen, texts).separation
    assert separation is not None and separation.domains == ("code", "law")
    assert separation.routers[0].scores["ridge"].accuracy > 0.9


def test_too_few_branches_and_copies_are_refused(tmp_path: Path) -> None:
    sources = tiny.sources(tmp_path, branches())
    two = {name: sources[name] for name in ("seed", "code")}
    cases: tuple[tuple[dict[str, Any], dict[str, TensorReader], str], ...] = (
        ({}, two, "with seed_expert=false, method btx needs two branches or more"),
        ({"num_experts": 3}, sources, "num_experts is 3, but with seed_expert=false each of the 2 branches is one"),
        ({"num_experts": 1}, sources, "num_experts is 1, but with seed_expert=false each of the 2 branches is one"),
        ({"num_experts_per_tok": 3}, sources, "num_experts_per_tok is 3: there are 2 experts"),
    )
    for more, models, message in cases:
        with pytest.raises(UpcycleError, match=message):
            upcycle_into(tmp_path / "out", models, settings("btx", seed_expert=False, **more))
    with pytest.raises(UpcycleError, match="with seed_expert=false, method soup needs two branches or more"):
        upcycle_into(tmp_path / "out", two, settings("soup", seed_expert=False))
    assert not (tmp_path / "out").exists()


def test_a_weight_of_a_seed_that_is_not_averaged_is_refused() -> None:
    weights = {"method": "btx", "average": {"weights": {"seed": 2.0}}}
    with pytest.raises(SettingsError, match=r"average\.weights gives the seed a weight"):
        mixture_settings({**weights, "seed_expert": False})
    mixture_settings(weights)
    with pytest.raises(SettingsError, match="seed_expert: unknown key"):
        mixture_settings({"method": "sparse", "num_experts": 4, "seed_expert": False})
