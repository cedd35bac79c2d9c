"""Verification: every mixture passes all checks, and each kind of damage fails the check that covers it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bam_ray.errors import UpcycleError
from bam_ray.families import PRIOR_PAIRS, PRIOR_TOKENS
from bam_ray.upcycling import CheckResult, mixture_config_of, verify
from tests.support import tiny
from tests.support.mixture_folders import (
    CASES,
    NAMES,
    PREFIX,
    SEED_ONLY_CASES,
    branches,
    domain_counts,
    reader,
    settings,
    upcycle_into,
)

COUNTS = domain_counts(*NAMES[:3])
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


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_embedding_experts_of_every_family_pass(tmp_path: Path, family: str) -> None:
    sources = tiny.sources(tmp_path, branches(family))
    for case in ("bam kv_experts", "btx"):
        folder = tmp_path / case
        upcycle_into(folder, sources, settings(case, num_experts_per_tok=1, **PREFIX), counts=COUNTS)
        for memory in (1, 1 << 30):
            found = results(folder, memory)
            assert all(result.passed for result in found.values()), found
            for name in ("identical experts", "one expert alone", "order"):
                error = found[name].error
                assert error is not None
                assert error < 1e-5


@pytest.mark.parametrize("prior", ["none", "bigram"])
def test_zero_routers_that_choose_by_number_pass(tmp_path: Path, prior: str) -> None:
    """The first token of a document has equal scores, also with a prior."""
    chosen = settings("btx", num_experts_per_tok=1, router={"init": "zero", "prior": prior})
    upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, branches()), chosen, counts=COUNTS)
    assert failed(tmp_path / "mixture") == {}


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


@pytest.fixture
def with_tables(tmp_path: Path) -> Path:
    """Return the folder of a mixture with embedding experts and a prior."""
    upcycle_into(tmp_path / "tables", tiny.sources(tmp_path, branches()), settings(**PREFIX), counts=COUNTS)
    return tmp_path / "tables"


@pytest.mark.parametrize("name", ["model.embed_tokens.experts.weight", "lm_head.experts.weight", PRIOR_PAIRS])
@pytest.mark.parametrize("damage", ["tables", "rows"])
def test_swapped_tables_and_rows_fail(with_tables: Path, name: str, damage: str) -> None:
    tensor = load_file(with_tables / "model.safetensors")[name]
    changed = tensor[[1, 0, 2]] if damage == "tables" else tensor.roll(1, dims=1)
    assert not torch.equal(changed, tensor)
    change_tensor(with_tables, name, changed.contiguous())
    assert failed(with_tables).keys() == {"files"}


def test_a_missing_table_or_row_fails(with_tables: Path) -> None:
    tables = load_file(with_tables / "model.safetensors")["lm_head.experts.weight"]
    for changed, shape in ((tables[:2], r"(2, 96, 32)"), (tables[:, :95], r"(3, 95, 32)")):
        change_tensor(with_tables, "lm_head.experts.weight", changed.contiguous())
        assert f"lm_head.experts.weight has shape {shape}, expected (3, 96, 32)" in failed(with_tables)["tensors"]


def test_counts_below_zero_fail(with_tables: Path) -> None:
    counts = load_file(with_tables / "model.safetensors")[PRIOR_TOKENS]
    counts[1, 7] = -3
    change_tensor(with_tables, PRIOR_TOKENS, counts)
    assert failed(with_tables)["tensors"] == f"{PRIOR_TOKENS} has counts below 0"


@pytest.mark.parametrize("extra", [PREFIX, {"router": PREFIX["router"]}])
def test_windows_leave_room_for_tables_and_counts(tmp_path: Path, extra: dict[str, Any]) -> None:
    """All layers are one window in twice the bytes of the mixture, and not in fewer."""
    upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, branches()), settings(**extra), counts=COUNTS)
    specs = reader(tmp_path / "mixture").specs.values()
    size = sum(spec.bytes for spec in specs)
    for memory, extent in ((2 * size, "whole model"), (2 * size - 1, "2 windows of layers")):
        assert results(tmp_path / "mixture", memory)["order"].detail == extent


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
