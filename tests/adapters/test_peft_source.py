"""LoRA adapters are read from peft's folders, and what does not fit the base model is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bam_ray.adapters.peft_source import PeftFolders, read_peft_folder
from bam_ray.errors import CheckpointError
from tests.support.peft_adapters import merged, write_adapter
from tests.support.tiny import dense

LAYER = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{LAYER}.lora_A.weight"


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    linear = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    return {name: (each.out_features, each.in_features) for name, each in linear.items()}


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "r": 3}, {"target_modules": ["q_proj", "down_proj"]}], ids=str
)
def test_an_adapter_changes_what_peft_merges(settings: dict[str, Any], tmp_path: Path) -> None:
    base = dense("llama", 0)
    adapter = read_peft_folder(write_adapter(tmp_path / "law", base, **settings), shapes_of(base))
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


def change_config(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return change


def change_tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "No such file"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "no JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), "is damaged"),
        (change_config(peft_type="IA3"), "peft_type is 'IA3'"),
        (change_config(use_dora=True), "use_dora is True"),
        (change_config(bias="all"), "bias is 'all'"),
        (change_config(modules_to_save=["lm_head"]), "modules_to_save"),
        (change_config(r=0), "r is 0"),
        (change_config(r=2), "has rank 4, but the configuration says 2"),
        (change_config(lora_alpha=float("nan")), "lora_alpha is nan"),
        (change_tensors(dict.clear), "changes no layer"),
        (change_tensors(lambda all_: all_.pop(KEY)), "only one factor"),
        (change_tensors(lambda all_: all_.update({"other": torch.ones(1)})), "no factor of a LoRA adapter"),
        (change_tensors(lambda all_: all_[KEY].fill_(float("inf"))), "factors are not finite"),
        (change_tensors(lambda all_: all_.update({KEY: torch.ones(4, 7)})), r"are \[4, 7\] and \[32, 4\]"),
    ],
)
def test_a_wrong_folder_is_one_line(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    base = dense("llama", 0)
    folder = write_adapter(tmp_path / "law", base)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        read_peft_folder(folder, shapes_of(base))
    assert "\n" not in str(error.value)
    assert ": " in str(error.value)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "law", dense("llama", 0))
    with pytest.raises(CheckpointError, match="no linear layer of the base model"):
        read_peft_folder(folder, {"model.layers.0.mlp.up_proj": (48, 32)})


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
