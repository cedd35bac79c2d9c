"""LoRA adapters are read from peft's folders, and what does not fit the base model is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bam_ray.adapters.peft_folder import read_peft_folder
from bam_ray.adapters.peft_source import PeftFolders
from bam_ray.errors import CheckpointError
from tests.support.peft_adapters import merged, write_adapter
from tests.support.tiny import dense


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    linear = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    return {name: (each.out_features, each.in_features) for name, each in linear.items()}


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "r": 3}, {"target_modules": ["q_proj", "down_proj"]}], ids=str
)
def test_an_adapter_changes_what_peft_merges(settings: dict[str, Any], tmp_path: Path) -> None:
    base = dense("llama", 0)
    adapter = read_peft_folder(write_adapter(tmp_path / "law", base, **settings), "law", shapes_of(base)).weights
    assert adapter.name == "law"
    expected = merged(base, tmp_path / "law")
    changed = {name for name, each in expected.named_modules() if isinstance(each, nn.Linear) and name != "lm_head"}
    if "target_modules" in settings:
        changed = {name for name in changed if name.endswith(tuple(settings["target_modules"]))}
    assert set(adapter.pairs) == changed
    for name, pair in adapter.pairs.items():
        weight = base.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        torch.testing.assert_close(
            weight + adapter.scale * pair.b @ pair.a, expected.get_submodule(name).weight, rtol=0, atol=1e-6
        )


def test_a_folder_of_adapters_follows_its_files(tmp_path: Path) -> None:
    base = dense("llama", 0)
    with pytest.raises(CheckpointError, match=r"set serve\.adapters\.source"):
        PeftFolders(tmp_path / "missing", {})
    source = PeftFolders(tmp_path, shapes_of(base))
    for name in ("law", "x y", ".hidden"):
        write_adapter(tmp_path / name, base)
    (tmp_path / "unfinished").mkdir()
    before = source.keys()
    assert [*before] == ["law"]
    assert source.fetch(before["law"]).name == "law"
    write_adapter(tmp_path / "law", base, seed=1, r=2)
    assert source.keys()["law"].version != before["law"].version
    with pytest.raises(CheckpointError, match="has changed while it was read: retry"):
        source.fetch(before["law"])
