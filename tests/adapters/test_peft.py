"""Adapters and peft: the same numbers in both directions, and folders that cannot be served are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from bam_ray.adapters.lora import LoraModel
from bam_ray.adapters.run_adapters import RunAdapters
from bam_ray.adapters.run_source import RunSource
from bam_ray.adapters.weights import AdapterWeights
from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import CheckpointError, SettingsError
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import Recipe
from tests.support import tiny
from tests.support.adapter_run import adapter_recipe, make_parents
from tests.support.command_line import bam, refusal
from tests.support.stage_run import run_task

IDS = torch.randint(2, 96, (2, 17), generator=torch.Generator().manual_seed(0))


def run_of(recipe: Recipe) -> PipelineRun:
    return PipelineRun.of(recipe, open_store(recipe.store.uri))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Make the first task of adapters of a recipe; every test copies the store."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAM_CACHE", str(folder / "cache"))
        recipe = adapter_recipe(folder)
        store = open_store(recipe.store.uri)
        make_parents(recipe, store, folder / "topics")
        run_task(recipe, store, ArtifactKind.ADAPTERS, "part-00")
    return recipe


@pytest.fixture
def recipe(made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made.store.uri, tmp_path / "store")
    return made.model_copy(update={"store": made.store.model_copy(update={"uri": str(tmp_path / "store")})})


@pytest.fixture
def path(recipe: Recipe, tmp_path: Path) -> str:
    """Return the path of the recipe, for commands."""
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.model_dump_json())
    return str(file)


def base_model(recipe: Recipe) -> PreTrainedModel:
    folder = run_of(recipe).artifact(ArtifactKind.SEEDS, "seed").fetch()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


@torch.no_grad()
def merged_logits(model: PreTrainedModel, weights: AdapterWeights) -> torch.Tensor:
    """Return the logits of a model to whose weights the change of an adapter was added."""
    for layer, pair in weights.pairs.items():
        model.get_submodule(layer).weight += weights.scale * pair.b @ pair.a
    logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_neox", "qwen3"])
def test_a_new_adapter_changes_nothing(family: str) -> None:
    model = tiny.dense(family, seed=1)
    with torch.no_grad():
        before = model(IDS).logits
        lora = LoraModel(model.requires_grad_(False), rank=4, alpha=8, targets="all-linear")
        lora.reset(seed=3)
        assert torch.equal(model(IDS).logits, before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not any("head" in name or "embed" in name for name in lora.layers)


def test_targets_that_no_layer_has_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"adapters\.targets .* does not fit the seed"):
        LoraModel(tiny.dense("llama", seed=1), rank=4, alpha=8, targets=["nothing"])


def test_peft_computes_what_the_exported_adapter_is(recipe: Recipe, tmp_path: Path) -> None:
    adapters = RunAdapters(run_of(recipe))
    adapters.export("topic-0002", tmp_path / "exported")
    loaded = PeftModel.from_pretrained(base_model(recipe), str(tmp_path / "exported"))
    with torch.no_grad():
        logits = loaded(IDS).logits
        base = base_model(recipe)(IDS).logits
    assert not torch.allclose(logits, base, atol=1e-4), "the adapter was trained"
    torch.testing.assert_close(
        merged_logits(base_model(recipe), adapters.get("topic-0002").read()), logits, atol=1e-5, rtol=1e-5
    )


def foreign_folder(recipe: Recipe, folder: Path, **changes: Any) -> torch.Tensor:
    """Write a random adapter with peft, and return the logits that peft computes with it."""
    torch.manual_seed(5)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **changes)
    model = get_peft_model(base_model(recipe), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize("stabilized", [False, True])
def test_an_adapter_of_peft_is_imported(recipe: Recipe, tmp_path: Path, stabilized: bool) -> None:
    logits = foreign_folder(recipe, tmp_path / "foreign", use_rslora=stabilized)
    RunAdapters(run_of(recipe)).add("legal", tmp_path / "foreign")
    adapters = RunAdapters(run_of(recipe))
    assert list(adapters.found) == ["legal", "topic-0000", "topic-0002", "topic-0004"]
    weights = adapters.get("legal").read()
    torch.testing.assert_close(merged_logits(base_model(recipe), weights), logits, atol=1e-5, rtol=1e-5)
    adapters.export("legal", tmp_path / "again")
    tensors = load_file(tmp_path / "foreign" / "adapter_model.safetensors")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_commands_list_import_export_and_remove(
    recipe: Recipe, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign_folder(recipe, tmp_path / "foreign")
    assert bam(monkeypatch, "adapters", "import", path, str(tmp_path / "foreign"), "--name", "legal") == 0
    assert bam(monkeypatch, "adapters", "export", path, "topic-0004", "--out", str(tmp_path / "out")) == 0
    assert bam(monkeypatch, "adapters", "export", path, "--out", str(tmp_path / "all")) == 0
    assert sorted(each.name for each in (tmp_path / "all").iterdir()) == [
        "legal",
        "topic-0000",
        "topic-0002",
        "topic-0004",
    ]
    assert bam(monkeypatch, "adapters", "remove", path, "topic-0002") == 0
    assert bam(monkeypatch, "adapters", "list", path) == 0
    listed = capsys.readouterr().out.partition("adapter ")[2]
    assert all(name in listed for name in ("legal", "topic-0000", "topic-0004", "part-00"))
    assert "topic-0002" not in listed
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert bam(monkeypatch, "adapters", "remove", path, "legal") == 0
    assert not [key for key in open_store(recipe.store.uri).list("adapters/legal")]
    capsys.readouterr()
    assert "no adapter 'legal'" in refusal(monkeypatch, capsys, "adapters", "remove", path, "legal")
    out = str(tmp_path / "out")
    assert "choose another one" in refusal(monkeypatch, capsys, "adapters", "export", path, "topic-0000", "--out", out)
    assert "has an adapter 'topic-0000' already" in refusal(
        monkeypatch, capsys, "adapters", "import", path, str(tmp_path / "foreign"), "--name", "topic-0000"
    )


def test_a_damaged_import_is_not_available(
    recipe: Recipe, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign_folder(recipe, tmp_path / "foreign")
    for name in ("legal", "sound"):
        RunAdapters(run_of(recipe)).add(name, tmp_path / "foreign")
    (index,) = Path(recipe.store.uri).glob("adapters/legal-*/files/*/adapters.json")
    index.write_bytes(index.read_bytes()[:-9])
    adapters = RunAdapters(run_of(recipe))
    assert list(adapters.found) == ["sound", "topic-0000", "topic-0002", "topic-0004"]
    assert list(RunSource(adapters).keys()) == list(adapters.found), "a replica serves the others"
    with pytest.raises(CheckpointError, match=r"adapters\.json does not match its manifest"):
        adapters.export("legal", tmp_path / "out")
    with pytest.raises(CheckpointError, match="has an adapter 'legal' already"):
        adapters.add("legal", tmp_path / "foreign")
    assert bam(monkeypatch, "adapters", "list", path) == 0
    shown = capsys.readouterr().out
    assert shown.count("legal is not available: ") == 1
    assert "adapters.json does not match its manifest: it was changed or damaged; `bam adapters remove`" in shown
    assert bam(monkeypatch, "adapters", "remove", path, "legal") == 0
    RunAdapters(run_of(recipe)).add("legal", tmp_path / "foreign")
    assert "legal" in RunAdapters(run_of(recipe)).found


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any], **metadata: str) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt", **metadata})

    return changed


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_config(peft_type="IA3"), "has peft_type 'IA3': only LORA can be served"),
        (change_config(use_dora=True), "has use_dora True: only plain LoRA can be served"),
        (change_config(modules_to_save=["lm_head"]), "has modules_to_save"),
        (change_config(bias="all"), "has bias 'all'"),
        (change_config(rank_pattern={"q_proj": 9}), "has rank_pattern"),
        (change_config(init_lora_weights="pissa"), "has init_lora_weights 'pissa'"),
        (change_config(r=0), "has r 0"),
        (change_config(r=5), "but rank 5 and the base model need"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "is not a folder of peft"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (truncate, "is damaged"),
        (change_weights(lambda tensors: tensors[FIRST].fill_(float("nan"))), "values that are not finite"),
        (change_weights(lambda tensors: tensors.pop(FIRST)), "without lora_A.weight"),
        (change_weights(lambda tensors: tensors.clear()), "has no tensors"),
        (change_weights(lambda tensors: tensors.update({"lm_head.weight": torch.ones(2)})), "is no factor of LoRA"),
        (
            change_weights(
                lambda tensors: tensors.update({FIRST.replace("layers.0", "layers.7"): tensors[FIRST].clone()})
            ),
            "for a layer that the base model does not have",
        ),
        (change_weights(lambda tensors: None, base_sha256="00" * 32), "belongs to a model with digest 000000000000"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused(
    recipe: Recipe, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "foreign"
    foreign_folder(recipe, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        RunAdapters(run_of(recipe)).add("legal", folder)
    assert "legal" not in RunAdapters(run_of(recipe)).found
