"""Verification: every mixture passes all checks, and each kind of damage fails the check that covers it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bam_ray.errors import UpcycleError
from bam_ray.upcycling import CheckResult, mixture_config_of, verify
from tests.support import tiny
from tests.support.mixture_folders import CASES, SEED_ONLY_CASES, branches, reader, settings, upcycle_into

TEXTS = {"general": tiny.tokens(16, 20, seed=1)}


def results(folder: Path, memory: int = 1 << 30) -> dict[str, CheckResult]:
    return {result.name: result for result in verify(reader(folder), memory)}


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("case", ["bam kv_experts", "bam kv_shared"])
def test_mixtures_of_every_family_pass(tmp_path: Path, family: str, case: str) -> None:
    upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, branches(family)), settings(case, num_experts_per_tok=1))
    for memory in (1, 1 << 30):  # one layer at a time, and the whole model
        found = results(tmp_path / "mixture", memory)
        assert all(result.passed for result in found.values()), found
        for name in ("identical experts", "one expert alone", "order"):
            error = found[name].error
            assert error is not None
            assert error < 1e-5


@pytest.mark.parametrize("case", ["btx", *SEED_ONLY_CASES])
def test_mixtures_of_every_method_pass(tmp_path: Path, case: str) -> None:
    models = branches() if case in CASES else branches(count=1)
    chosen = settings(case, dense_layers=[0]) if "groups" not in case else settings(case)
    upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, models), chosen, TEXTS)
    found = results(tmp_path / "mixture")
    assert all(result.passed for result in found.values()), found
    config = mixture_config_of(reader(tmp_path / "mixture"))
    assert ("all slices" in found) == (config.dense_intermediate_size is not None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a mixture."""
    upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, branches()), settings())
    return tmp_path / "mixture"


def change_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def failed(folder: Path) -> dict[str, str]:
    """Return the details of the checks that failed, by name."""
    return {result.name: result.detail for result in results(folder).values() if not result.passed}


def test_a_changed_file_fails(folder: Path) -> None:
    change_tensor(folder, "model.norm.weight", torch.ones(32))
    assert failed(folder) == {
        "files": f"{folder}/model.safetensors does not match its manifest: the file was changed or damaged"
    }


def test_an_infinite_value_fails(folder: Path) -> None:
    change_tensor(folder, "model.norm.weight", torch.full((32,), float("inf")))
    assert failed(folder)["tensors"] == "model.norm.weight has values that are not finite"


def test_a_tensor_of_another_shape_fails(folder: Path) -> None:
    change_tensor(folder, "model.norm.weight", torch.ones(31))
    assert "model.norm.weight has shape (31,), expected (32,)" in failed(folder)["tensors"]


def test_a_configuration_of_another_function_fails(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_interleaved": True}))
    assert {"identical experts", "one expert alone"} <= failed(folder).keys()


def test_a_tensor_without_origin_fails(folder: Path) -> None:
    lineage = json.loads((folder / "lineage.json").read_text())
    del lineage["tensors"]["model.norm.weight"]
    (folder / "lineage.json").write_text(json.dumps(lineage))
    assert failed(folder)["lineage"] == "model.norm.weight has no origin (1 tensors have none)"


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    sources = tiny.sources(tmp_path, branches(count=1))
    with pytest.raises(UpcycleError, match="is a dense 'llama' model, not a mixture"):
        verify(sources["seed"])
