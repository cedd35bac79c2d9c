"""`verify`: every mixture passes its receipts, and what is wrong with one fails the receipt that is about it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bam_ray.errors import UpcycleError
from bam_ray.upcycling import Receipt, verify
from tests.support import tiny
from tests.support.mixture_folders import CASES, SEED_ONLY_CASES, branches, reader, settings, upcycle_into

TEXTS = {"general": tiny.tokens(16, 20, seed=1)}


def receipts(folder: Path, memory: int = 1 << 30) -> dict[str, Receipt]:
    found = verify(reader(folder), memory)
    return {receipt.name: receipt for receipt in found}


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("case", ["bam kv_experts", "bam kv_shared"])
def test_mixtures_of_every_family_pass(tmp_path: Path, family: str, case: str) -> None:
    upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, branches(family)), settings(case, num_experts_per_tok=1))
    for memory in (1, 1 << 30):  # a layer at a time, and the whole model
        found = receipts(tmp_path / "mixture", memory)
        assert all(receipt.passed for receipt in found.values()), found
        for name in ("identical experts", "one expert alone", "order"):
            error = found[name].error
            assert error is not None
            assert error < 1e-5


@pytest.mark.parametrize("case", ["btx", *SEED_ONLY_CASES])
def test_mixtures_of_every_method_pass(tmp_path: Path, case: str) -> None:
    models = branches() if case in CASES else branches(count=1)
    wanted = settings(case, dense_layers=[0]) if "groups" not in case else settings(case)
    made = upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, models), wanted, TEXTS)
    found = receipts(tmp_path / "mixture")
    assert all(receipt.passed for receipt in found.values()), found
    assert ("all slices" in found) == (made.config.dense_intermediate_size is not None)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, branches()), settings())
    return tmp_path / "mixture"


def changed(folder: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def failed(folder: Path) -> dict[str, str]:
    return {receipt.name: receipt.detail for receipt in receipts(folder).values() if not receipt.passed}


def test_a_changed_file_fails(made: Path) -> None:
    changed(made, "model.norm.weight", torch.ones(32))
    assert failed(made) == {
        "files": f"{made}/model.safetensors does not match its manifest: the file was changed or damaged"
    }


def test_a_value_that_is_not_finite_fails(made: Path) -> None:
    changed(made, "model.norm.weight", torch.full((32,), float("inf")))
    assert failed(made)["tensors"] == "model.norm.weight holds values that are not finite"


def test_a_tensor_of_another_shape_fails(made: Path) -> None:
    changed(made, "model.norm.weight", torch.ones(31))
    assert "model.norm.weight is (31,), expected (32,)" in failed(made)["tensors"]


def test_a_configuration_that_computes_something_else_fails(made: Path) -> None:
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"rope_interleaved": True}))
    assert {"identical experts", "one expert alone"} <= failed(made).keys()


def test_a_tensor_without_origin_fails(made: Path) -> None:
    lineage = json.loads((made / "lineage.json").read_text())
    del lineage["tensors"]["model.norm.weight"]
    (made / "lineage.json").write_text(json.dumps(lineage))
    assert failed(made)["lineage"] == "model.norm.weight has no origin (1 lack one)"


def test_a_dense_model_is_no_mixture(tmp_path: Path) -> None:
    sources = tiny.sources(tmp_path, branches(count=1))
    with pytest.raises(UpcycleError, match="is a 'llama' model, no mixture"):
        verify(sources["seed"])
