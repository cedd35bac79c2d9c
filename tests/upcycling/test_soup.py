"""Model soups: the weight average of a seed and its branches is a dense model of the seed's architecture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import UpcycleError
from bam_ray.upcycling import ExpertEdit, mixture_config_of, verify, write_edited_mixture
from bam_ray.upcycling.averaging import ties
from bam_ray.upcycling.inspect import inspect
from tests.support import tiny
from tests.support.mixture_folders import DENSE_CASES, MANIFEST, branches, reader, settings, upcycle_into


def soup(folder: Path, family: str = "llama", case: str = "soup", **more: Any) -> Path:
    """Average a seed and two branches, and return the folder of the result."""
    upcycled = upcycle_into(folder / "soup", tiny.sources(folder, branches(family)), settings(case, **more))
    assert upcycled.experts == ()
    assert upcycled.separation is None
    return folder / "soup"


def stored_tensors(folder: Path, *names: str) -> list[dict[str, Tensor]]:
    """Return all tensors of the models in subfolders of `folder`, by name."""
    readers = [reader(folder / name) for name in names]
    return [{name: each.read(name) for name in each.specs} for each in readers]


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_a_soup_is_the_mean_of_all_tensors(tmp_path: Path, family: str) -> None:
    soup(tmp_path, family)
    averaged, *models = stored_tensors(tmp_path, "soup", "seed", "code", "law")
    assert averaged.keys() == models[0].keys()
    for name, tensor in averaged.items():
        mean = torch.stack([model[name] for model in models]).mean(0)
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, mean, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@torch.no_grad()
def test_a_soup_loads_as_the_architecture_of_the_seed(tmp_path: Path, family: str) -> None:
    folder = soup(tmp_path, family)
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "seed/config.json").read_text())
    assert not list(folder.glob("*.py"))
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    models = branches(family)
    assert type(model) is type(models["seed"])
    expected = models["seed"]
    others = [dict(models[name].named_parameters()) for name in ("code", "law")]
    for name, parameter in expected.named_parameters():
        parameter.copy_((parameter + others[0][name] + others[1][name]) / 3)
    ids = tiny.tokens()
    torch.testing.assert_close(model.eval()(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)


def test_weights_of_the_mean_are_used(tmp_path: Path) -> None:
    soup(tmp_path, average={"weights": {"seed": 0.0, "code": 3.0}})
    averaged, code, law = stored_tensors(tmp_path, "soup", "code", "law")
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, 0.75 * code[name] + 0.25 * law[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_neox"])
def test_a_soup_can_be_merged_with_ties(tmp_path: Path, family: str) -> None:
    soup(tmp_path, family, average={"how": "ties", "density": 0.5, "scale": 0.7})
    merged, *models = stored_tensors(tmp_path, "soup", "seed", "code", "law")
    for name, tensor in merged.items():
        seed, *others = (model[name].flatten() for model in models)
        assert torch.equal(tensor.flatten(), ties(seed, others, 0.5, 0.7))


def test_a_bf16_soup_is_computed_in_fp32(tmp_path: Path) -> None:
    models = {name: model.bfloat16() for name, model in branches().items()}
    upcycle_into(tmp_path / "soup", tiny.sources(tmp_path, models), settings("soup"))
    (averaged,) = stored_tensors(tmp_path, "soup")
    mean = sum(model.model.norm.weight.float() for model in models.values()) / 3
    assert torch.equal(averaged["model.norm.weight"], mean.bfloat16())


def test_branches_are_required(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="method soup needs branches"):
        upcycle_into(tmp_path / "soup", tiny.sources(tmp_path, branches(count=1)), settings("soup"))
    assert not (tmp_path / "soup").exists()


def test_branches_of_another_seed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="does not descend from 'seed'"):
        soup(tmp_path, same_seed=True)


@pytest.mark.parametrize("case", DENSE_CASES)
def test_the_lineage_lists_the_sources(tmp_path: Path, case: str) -> None:
    folder = soup(tmp_path, case=case)
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["sources"] == {name: reader(tmp_path / name).uri for name in ("seed", "code", "law")}
    assert lineage["tensors"].keys() == reader(folder).specs.keys()
    assert lineage["history"] == [{"upcycle": lineage["history"][0]["upcycle"], "of": lineage["sources"]}]
    assert lineage["history"][0]["upcycle"]["method"] == "soup"
    assert "A weight average of seed, code, law" in (folder / "README.md").read_text()
    assert reader(folder).check_digests() > 0


def test_commands_for_mixtures_name_a_soup_as_a_dense_model(tmp_path: Path) -> None:
    folder = reader(soup(tmp_path))
    summary = inspect(folder)
    assert summary.architecture == "llama (dense)"
    assert summary.mixture == {}
    assert len(summary.history) == 1
    edit = ExpertEdit("absorb", (0, None), ("0", "medicine"))
    writer = ModelWriter(FolderStore(tmp_path / "out"))
    for command in (
        lambda: verify(folder),
        lambda: mixture_config_of(folder),
        lambda: write_edited_mixture(folder, edit, None, writer, MANIFEST),
    ):
        with pytest.raises(UpcycleError, match="is a dense 'llama' model, not a mixture"):
            command()
    assert not (tmp_path / "out").exists()
