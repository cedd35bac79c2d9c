"""Mixtures whose config.json or lineage.json does not fit their weights are refused in one line, and quickly."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import BamError, UpcycleError
from bam_ray.model import BamConfig
from bam_ray.upcycling import add_expert, export_mixtral, mixture_config_of, verify, write_edited_mixture
from bam_ray.upcycling.inspect import inspect
from tests.support import tiny
from tests.support.mixture_folders import MANIFEST, branches, reader, upcycle_into
from tests.support.mixture_folders import settings as method


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a BTX mixture of a seed and a branch, next to a folder of the branch."""
    folder = tmp_path_factory.mktemp("mixture")
    upcycle_into(folder / "mixture", tiny.sources(folder, branches(count=2)), method("btx"))
    return folder / "mixture"


@pytest.fixture
def changed(mixture: Path) -> Any:
    """Return a function that returns a reader of the mixture with a changed config.json, which is restored later."""
    path = mixture / "config.json"
    original = path.read_text()

    def change(**settings: Any) -> TensorReader:
        path.write_text(json.dumps(json.loads(original) | settings))
        return reader(mixture)

    yield change
    path.write_text(original)


def absorb(mixture: TensorReader, folder: Path) -> None:
    branch = reader(folder.parent / "code")
    config: BamConfig = mixture_config_of(mixture)
    write_edited_mixture(
        mixture, add_expert(config, "more"), branch, ModelWriter(FolderStore(folder / "out")), MANIFEST
    )


def export(mixture: TensorReader, folder: Path) -> None:
    export_mixtral(mixture, ModelWriter(FolderStore(folder / "export")), MANIFEST)


USES: list[Callable[[TensorReader, Path], object]] = [
    lambda mixture, folder: inspect(mixture),
    lambda mixture, folder: verify(mixture),
    absorb,
    export,
]


@pytest.mark.parametrize("use", USES, ids=["inspect", "verify", "absorb", "export"])
@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 200_000_000},
        {"num_experts": 10**9, "expert_names": None},
        {"num_experts": "two"},
        {"num_experts_per_tok": 7},
        {"dense_layers": [7]},
        {"seed_config": {"model_type": "qwen2", "num_hidden_layers": 200_000_000}},
        {"seed_config": [1]},
        {"attention_experts": "all"},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_configuration_of_another_mixture_is_refused(
    changed: Callable[..., TensorReader],
    mixture: Path,
    use: Callable[[TensorReader, Path], object],
    change: dict[str, Any],
) -> None:
    started = time.monotonic()
    with pytest.raises(BamError) as caught:
        use(changed(**change), mixture)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("use", [absorb, export])
@pytest.mark.parametrize("change", ["more", "less"])
def test_other_tensors_than_those_of_the_mixture_are_refused(
    mixture: Path, tmp_path: Path, use: Callable[[TensorReader, Path], object], change: str
) -> None:
    shutil.copytree(mixture, tmp_path / "mixture")
    shutil.copytree(mixture.parent / "code", tmp_path / "code")
    path = tmp_path / "mixture" / "model.safetensors"
    weights = load_file(path)
    if change == "more":
        weights["model.layers.0.mlp.extra"] = torch.ones(2)
    else:
        del weights["model.norm.weight"]
    save_file(weights, path)
    with pytest.raises(UpcycleError, match=r"\(1 tensors differ\): use a complete mixture"):
        use(reader(tmp_path / "mixture"), tmp_path / "mixture")


@pytest.mark.parametrize("lineage", ["{", "[]", "7", '{"history": 7, "tensors": 7}', '{"history": [7], "tensors": []}'])
def test_a_damaged_lineage_is_one_line(mixture: Path, lineage: str) -> None:
    path = mixture / "lineage.json"
    original = path.read_text()
    path.write_text(lineage)
    try:
        results = {result.name: result for result in verify(reader(mixture))}
        assert results["lineage"].detail == "lineage.json is damaged"
        for use in (inspect, lambda each: absorb(each, mixture)):
            with pytest.raises(BamError, match=r"lineage\.json .*the file is damaged"):
                use(reader(mixture))
    finally:
        path.write_text(original)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=3), st.just([7]))
KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "num_experts",
    "rope_parameters",
    "head_dim",
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
def test_random_settings_of_a_mixture_are_one_line(
    changed: Callable[..., TensorReader], change: dict[str, Any]
) -> None:
    try:
        inspect(changed(**change))
    except BamError as error:
        assert "\n" not in str(error)  # noqa: PT017 (both outcomes are right)
