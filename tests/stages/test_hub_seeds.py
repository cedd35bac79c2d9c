"""Seeds in the format of model hubs: bf16 shards, tied or untied, with a configuration of an older transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bam_ray.blobs import BlobStore, open_store
from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import CheckpointError, Interrupted, SettingsError
from bam_ray.model.loading import load_folder
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.settings import Recipe
from bam_ray.training.state import TrainingState
from tests.support import tiny
from tests.support.stage_run import (
    TRAINING,
    RecordingContext,
    make_artifacts,
    run_task,
    small_recipe,
)
from tests.support.state_parts import part_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a corpus's tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    run = small_recipe(folder)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora",))
    artifact = Artifact(store, "corpora", task_graph(run)[0].id)
    (folder / "tokenizer").mkdir()
    shutil.copytree(artifact.fetch(folder / "cache") / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    return folder / "tokenizer"


def hub_folder(family: str, tokenizer: Path, folder: Path, rows: int = 300) -> dict[str, torch.Tensor]:
    """Write a model with `rows` embeddings in the format of a hub, and return its weights."""
    config = type(tiny.CONFIGS[family]).from_dict({**tiny.CONFIGS[family].to_dict(), "vocab_size": rows})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    written = json.loads((folder / "config.json").read_text())
    rope = written.pop("rope_parameters")
    written |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": written.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(written))
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    # Many hub folders hold the same weights in a second layout
    save_file({"tok_embeddings.weight": torch.zeros(4)}, folder / "consolidated.safetensors")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return {name: tensor for path in folder.glob("model-*.safetensors") for name, tensor in load_file(path).items()}


def imported_seed_recipe(folder: Path, uri: str, tokenizer: Path) -> Recipe:
    """Return a recipe whose seed is the folder at `uri`."""
    data = {**small_recipe(folder).data.model_dump(), "tokenizer": {"folder": str(tokenizer)}}
    return small_recipe(folder, data=data, seed={"folder": uri}, branch={"domains": ["code"], "training": TRAINING})


def reader(store: BlobStore, run: Recipe, kind: Any, name: str) -> TensorReader:
    return TensorReader(store, f"{kind}/{find_task(task_graph(run), kind, name).id}")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_hub_folder_is_branched_and_upcycled(family: str, tokenizer: Path, tmp_path: Path) -> None:
    weights = hub_folder(family, tokenizer, tmp_path / "hub")
    uri = str(tmp_path / "hub")
    (tmp_path / "hub" / "additional_chat_templates").mkdir()
    (tmp_path / "hub" / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    run = imported_seed_recipe(tmp_path, uri, tokenizer)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled"))

    seed, branch = reader(store, run, "seeds", "seed"), reader(store, run, "branches", "code")
    tied = tiny.CONFIGS[family].tie_word_embeddings
    assert ("lm_head.weight" in weights) != tied
    assert set(seed.specs) == set(branch.specs) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(seed.read(name), weight), name
        trained = branch.read(name)
        assert trained.dtype == torch.bfloat16, "the seed's"
        assert not torch.equal(trained, weight), f"{name} was not trained"
        assert (trained.float() - weight.float()).abs().max() < 0.5
    assert seed.read_file("additional_chat_templates/tools.jinja") == b"{{ tools }}"
    copied = {key.removeprefix(f"{seed.prefix}/") for key in store.list(seed.prefix)}
    assert not [key for key in copied if "consolidated" in key or "original" in key]
    mixture = Artifact(store, "upcycled", find_task(task_graph(run), "upcycled", "bam").id).fetch()
    assert AutoModelForCausalLM.from_pretrained(mixture).config.expert_names == ["seed", "code"]


def test_a_checkpoint_in_parts_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    hub_folder("llama", tokenizer, tmp_path / "hub")
    weights = load_folder(tmp_path / "hub", torch.float32)
    state = TrainingState(weights, weights.state_dict(), {}, 0, live=True)
    for part in range(2):
        part_of(state, part, 2).write(tmp_path / "checkpoint")
    run = imported_seed_recipe(tmp_path, str(tmp_path / "checkpoint"), tokenizer)
    with pytest.raises(CheckpointError, match=r"divided into parts.*`bam export-step`"):
        make_artifacts(run, open_store(run.store.uri), ("corpora", "seeds"))


@pytest.mark.parametrize("change", ["prefix", "link"])
def test_a_seed_that_would_not_load_whole_is_refused(change: str, tokenizer: Path, tmp_path: Path) -> None:
    weights = hub_folder("llama", tokenizer, tmp_path / "hub")
    if change == "prefix":
        save_file({f"_orig_mod.{name}": each for name, each in weights.items()}, tmp_path / "hub" / "model.safetensors")
    else:
        (tmp_path / "secret").write_text("key")
        (tmp_path / "hub" / "notes.txt").symlink_to(tmp_path / "secret")
    run = imported_seed_recipe(tmp_path, str(tmp_path / "hub"), tokenizer)
    with pytest.raises(CheckpointError, match=r"'_orig_mod' of torch\.compile|is a link to .*secret, outside"):
        make_artifacts(run, open_store(run.store.uri), ("corpora", "seeds"))


def test_a_tokenizer_beyond_the_seed_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    hub_folder("llama", tokenizer, tmp_path / "hub", rows=290)
    run = imported_seed_recipe(tmp_path, str(tmp_path / "hub"), tokenizer)
    with pytest.raises(SettingsError, match=r"has 300 tokens but the seed .* only 290: .*resize_token_embeddings"):
        make_artifacts(run, open_store(run.store.uri), ("corpora", "seeds"))


def test_a_seed_with_padded_embeddings_is_branched(tokenizer: Path, tmp_path: Path) -> None:
    hub_folder("llama", tokenizer, tmp_path / "hub", rows=320)
    run = imported_seed_recipe(tmp_path, str(tmp_path / "hub"), tokenizer)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled"))
    assert reader(store, run, "upcycled", "bam").config["vocab_size"] == 320


@pytest.mark.parametrize("method", ["bam", "soup"])
def test_models_have_the_dtype_of_the_seed(method: str, tokenizer: Path, tmp_path: Path) -> None:
    hub_folder("llama", tokenizer, tmp_path / "hub")
    plain = imported_seed_recipe(tmp_path, str(tmp_path / "hub"), tokenizer).model_dump()
    run = Recipe.model_validate({**plain, "upcycle": {"mixtures": {"mixed": {"method": method}}}})
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled"))
    with pytest.raises(Interrupted):
        run_task(run, store, ArtifactKind.MIXTURES, "mixed", RecordingContext(stop_at=6))
    task = find_task(task_graph(run), "mixtures", "mixed")
    prefix = f"mixtures/{task.id}/steps/0001.0001-00000006"
    assert {spec.dtype for spec in TensorReader(store, prefix).specs.values()} == {torch.float32}, "a checkpoint"
    run_task(run, store, ArtifactKind.MIXTURES, "mixed")
    for kind, name in (("branches", "code"), ("mixtures", "mixed")):
        found = reader(store, run, kind, name)
        assert {spec.dtype for spec in found.specs.values()} == {torch.bfloat16}
        assert found.config["dtype"] == "bfloat16"
        folder = Artifact(store, ArtifactKind(kind), found.prefix.rpartition("/")[2]).fetch()
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


class RecordingStore(MemoryStore):
    """A store that records the reads of whole blobs and the lengths of range reads."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.whole: list[str] = []
        self.ranges: list[int] = []

    def get(self, key: str) -> bytes:
        self.whole.append(key)
        return super().get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.ranges.append(length)
        return super().get(key)[start : start + length]

    def get_file(self, key: str, path: Path) -> None:
        path.write_bytes(super().get(key))

    def size(self, key: str) -> int:
        return len(super().get(key))


def test_a_seed_is_imported_without_being_held_in_memory(tokenizer: Path, tmp_path: Path) -> None:
    weights = hub_folder("llama", tokenizer, tmp_path / "hub")
    source = RecordingStore.named(f"hub-{tmp_path.name}")
    assert isinstance(source, RecordingStore)
    for path in (tmp_path / "hub").rglob("*"):
        if path.is_file():
            source.put(str(path.relative_to(tmp_path / "hub")), path.read_bytes())
    run = imported_seed_recipe(tmp_path, source.uri, tokenizer)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds"))
    assert set(reader(store, run, "seeds", "seed").specs) == set(weights)
    assert not [key for key in source.whole if key.endswith(".safetensors")]
    assert max(source.ranges) < 5000, "only headers may be read by range"
