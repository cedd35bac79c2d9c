"""The size of a seed that is a folder: its `config.json` is read with the checks of all readers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bam_ray.blobs import open_store
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.errors import CheckpointError, StoreBusy, StoreUnavailable
from bam_ray.families import SIZE_SETTINGS
from bam_ray.planning import model_size
from bam_ray.planning.model_size import SIZES, seed_size
from bam_ray.planning.planner import make_plan
from bam_ray.settings import Recipe, load_recipe
from tests.support import tiny
from tests.support.failing_store import FailingStore

DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.CONFIGS["llama"].save_pretrained(tmp_path / "seed")
    return tmp_path / "seed"


def of_folder(folder: Path | str) -> Recipe:
    return load_recipe(DEMO, [f"seed={{folder: '{folder}'}}"])


def change(folder: Path, **settings: Any) -> bytes:
    return json.dumps(json.loads((folder / "config.json").read_bytes()) | settings).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: the file is damaged"),
        (b"[]", "is not a JSON object: the file is damaged"),
        (POINTER, "is a pointer of Git LFS"),
        ({"hidden_size": "64"}, "hidden_size is '64': use the config.json that was saved with the weights"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: use"),
        ({"vocab_size": 2.5}, "vocab_size is 2.5: use"),
        ({"head_dim": True}, "head_dim is True: use"),
    ],
)
def test_a_damaged_configuration_is_refused(folder: Path, content: bytes | dict[str, Any], message: str) -> None:
    data = content if isinstance(content, bytes) else change(folder, **content)
    (folder / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        make_plan(of_folder(folder))
    assert f"{folder}/config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a PEFT adapter, not a whole model"):
        make_plan(of_folder(tmp_path))


def test_a_setting_without_a_value_has_its_default(folder: Path) -> None:
    (folder / "config.json").write_bytes(change(folder, num_key_value_heads=None))
    size = seed_size(of_folder(folder))
    assert size is not None and size.key == size.query


def test_the_model_of_another_run_is_found(folder: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    artifact = Artifact(store, ArtifactKind.BRANCHES, "law")
    artifact.publish(folder, Manifest(id="law", kind=ArtifactKind.BRANCHES, name="law"))
    assert seed_size(of_folder(tmp_path / "store" / artifact.prefix)) == seed_size(of_folder(folder)) is not None


def test_the_tokenizer_may_be_that_of_an_adapter(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    size = seed_size(load_recipe(DEMO, [f"data.tokenizer.folder={folder}"]))
    assert size is not None and size.vocabulary == tiny.CONFIGS["llama"].vocab_size
    shutil.rmtree(folder)
    assert seed_size(load_recipe(DEMO, [f"data.tokenizer.folder={folder}"])) is None


def test_a_busy_store_is_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, lines = FailingStore(), []
    store.put("config.json", (folder / "config.json").read_bytes())
    monkeypatch.setattr(model_size, "open_store", lambda *arguments: store)

    def report(line: str) -> None:
        lines.append(line)
        store.failure = None

    store.failure = StoreBusy("SlowDown")
    assert seed_size(of_folder("memory://seed"), report) == seed_size(of_folder(folder)) is not None
    assert len(lines) == 1
    store.failure = StoreUnavailable("no S3 server answers")
    assert seed_size(of_folder("memory://seed"), report) is None, "a plan can be made elsewhere"


def test_the_sizes_are_those_of_all_families() -> None:
    assert {*SIZES, "tie_word_embeddings"} == set(SIZE_SETTINGS)
