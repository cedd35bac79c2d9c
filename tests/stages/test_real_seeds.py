"""Seeds as they lie on hubs: bf16, in shards, tied or not, with a configuration of an older transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bam_ray.blobs import BlobStore, open_store
from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.settings import Recipe
from tests.support import tiny
from tests.support.stage_run import (
    TRAINING,
    make_artifacts,
    small_recipe,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's folder: that of a corpus."""
    folder = tmp_path_factory.mktemp("tokenizer")
    run = small_recipe(folder)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora",))
    artifact = Artifact(store, "corpora", task_graph(run)[0].id)
    (folder / "tokenizer").mkdir()
    for key in store.list(f"{artifact.prefix}/tokenizer/"):
        store.get_file(key, folder / "tokenizer" / key.rpartition("/")[2])
    return folder / "tokenizer"


def hub_folder(family: str, tokenizer: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write a model as a hub has it; returns its weights."""
    config = type(tiny.CONFIGS[family]).from_dict({**tiny.CONFIGS[family].to_dict(), "vocab_size": 300})
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
    save_file({"tok_embeddings.weight": torch.zeros(4)}, folder / "consolidated.safetensors")  # another layout's
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return {name: tensor for path in folder.glob("model-*.safetensors") for name, tensor in load_file(path).items()}


def seeded(folder: Path, uri: str, tokenizer: Path) -> Recipe:
    data = {**small_recipe(folder).data.model_dump(), "tokenizer": {"folder": str(tokenizer)}}
    return small_recipe(folder, data=data, seed={"folder": uri}, branch={"domains": ["code"], "training": TRAINING})


def reader(store: BlobStore, run: Recipe, kind: Any, name: str) -> TensorReader:
    return TensorReader(store, f"{kind}/{find_task(task_graph(run), kind, name).id}")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_hub_folder_is_branched_and_upcycled(family: str, tokenizer: Path, tmp_path: Path) -> None:
    weights = hub_folder(family, tokenizer, tmp_path / "hub")
    uri = str(tmp_path / "hub")
    run = seeded(tmp_path, uri, tokenizer)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled"))

    seed, branch = reader(store, run, "seeds", "seed"), reader(store, run, "branches", "code")
    tied = tiny.CONFIGS[family].tie_word_embeddings
    assert ("lm_head.weight" in weights) != tied
    assert set(seed.specs) == set(branch.specs) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(seed.read(name), weight), name
        trained = branch.read(name)
        assert trained.dtype == torch.float32
        assert not torch.equal(trained, weight.float()), f"{name} was not trained"
        assert (trained - weight.float()).abs().max() < 0.5
    copied = {key.removeprefix(f"{seed._prefix}/") for key in store.list(seed._prefix)}
    assert not [key for key in copied if "consolidated" in key or "original" in key]
    mixture = Artifact(store, "upcycled", find_task(task_graph(run), "upcycled", "bam").id).fetch()
    assert AutoModelForCausalLM.from_pretrained(mixture).config.expert_names == ["seed", "code"]


class Watched(MemoryStore):
    """A store that knows what was asked of it."""

    def __init__(self) -> None:
        super().__init__("hub")
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


def test_a_seed_comes_from_a_store_without_being_held_in_memory(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = hub_folder("llama", tokenizer, tmp_path / "hub")
    source = Watched()
    monkeypatch.setitem(MemoryStore._named, "hub", source)
    for path in (tmp_path / "hub").rglob("*"):
        if path.is_file():
            source.put(str(path.relative_to(tmp_path / "hub")), path.read_bytes())
    run = seeded(tmp_path, "memory://hub", tokenizer)
    store = open_store(run.store.uri)
    make_artifacts(run, store, ("corpora", "seeds"))
    assert set(reader(store, run, "seeds", "seed").specs) == set(weights)
    assert not [key for key in source.whole if key.endswith(".safetensors")]
    assert max(source.ranges) < 5000, "more than headers were read"
