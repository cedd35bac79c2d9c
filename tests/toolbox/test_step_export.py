"""Training checkpoints are copied out of a run as Hugging Face folders."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bam_ray import cli
from bam_ray.blobs import BlobStore, open_store
from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import AttemptNumber, Lease
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.cli.app import app
from bam_ray.errors import BlobNotFound, CheckpointError, DigestMismatch, Interrupted, SettingsError
from bam_ray.pipeline.graph import find_task, task_graph
from bam_ray.settings import Recipe, StoreSettings
from bam_ray.toolbox import step_export
from bam_ray.toolbox.step_export import export_step
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.state import TrainingState
from tests.support.stage_run import (
    RecordingContext,
    make_artifacts,
    run_task,
    small_recipe,
)
from tests.support.state_parts import part_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Return a run that was stopped at step 6 of its mixture."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("run")
        patch.setenv("BAM_CACHE", str(folder / "cache"))
        run = small_recipe(folder)
        store = open_store(run.store.uri)
        make_artifacts(run, store, ("corpora", "seeds", "branches", "upcycled"))
        with pytest.raises(Interrupted, match="step 6 of 10"):
            run_task(run, store, "mixtures", "bam", RecordingContext(6))
    return run


@pytest.fixture
def store(run: Recipe) -> BlobStore:
    return open_store(run.store.uri)


def test_the_newest_checkpoint_loads_with_transformers(
    run: Recipe, store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["bam", "export-step", run.store.uri, "mixtures/bam", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "(mixtures/bam at step 6, attempt 0001.0001)" in " ".join(capsys.readouterr().out.split())

    task = find_task(task_graph(run), "mixtures", "bam")
    saved = TensorReader(store, f"mixtures/{task.id}/steps/0001.0001-00000006")
    model = AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in model.state_dict().items():
        if name in saved.specs:
            assert torch.equal(tensor, saved.read(name))
    assert AutoTokenizer.from_pretrained(out).encode("abc")
    names = {path.name for path in out.iterdir()}
    assert {"modeling_bam.py", "configuration_bam.py", "config.json", "tokenizer.json"} <= names
    assert not {"optimizer.safetensors", "trainer.json"} & names
    manifest = TensorReader(open_store(str(out))).manifest()
    assert manifest is not None
    assert (manifest.id, manifest.name, manifest.step) == (task.id, "bam", 6)
    assert set(manifest.files) == names - {"manifest.json"}
    assert TensorReader(open_store(str(out))).check_digests() == len(manifest.files)


def test_a_checkpoint_is_chosen_by_its_step(run: Recipe, store: BlobStore, tmp_path: Path) -> None:
    assert export_step(store, "mixtures", "bam", StoreSettings(uri=str(tmp_path / "four")), step=4).step == 4
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 5 \(available: \[4, 6\]\)"):
        export_step(store, "mixtures", "bam", StoreSettings(uri=str(tmp_path / "five")), step=5)


class PruningStore(FolderStore):
    """A copy of a run that is still training: each of the first `pruned` reads of weights deletes that checkpoint."""

    def __init__(self, run: BlobStore, folder: Path, pruned: int) -> None:
        shutil.copytree(run.uri, folder)
        super().__init__(folder)
        self._left = pruned

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if self._left and key.endswith("/model.safetensors"):
            self._left -= 1
            for file in list(self.list(key.removesuffix("model.safetensors"))):
                self.delete(file)
        return super().get_range(key, start, length)


def test_the_parts_of_a_checkpoint_are_put_together(run: Recipe, store: BlobStore, tmp_path: Path) -> None:
    task = find_task(task_graph(run), "mixtures", "bam")
    shutil.copytree(run.store.uri, tmp_path / "run")
    copied = open_store(str(tmp_path / "run"))
    artifact = Artifact(copied, task.kind, task.id)
    newest = Checkpoints(artifact, None, Retention(2, None)).latest()
    assert newest is not None
    model = AutoModelForCausalLM.from_pretrained(newest.folder)
    whole = TrainingState(model, model.state_dict(), {}, 7, live=False)
    lease = Lease.take(copied, artifact.prefix, AttemptNumber(1, 2))
    ranks = [Checkpoints(artifact, lease, Retention(2, None)) for _ in range(3)]
    for part, rank in enumerate(ranks):
        rank.save(part_of(whole, part, 3), {"step": 7, "curve": []})
    for rank in ranks:
        rank.wait()

    out = StoreSettings(uri=str(tmp_path / "out"))
    assert export_step(copied, "mixtures", "bam", out).step == 7
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.state_dict().items())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert not any("part-" in name or "optimizer" in name or name == "trainer.json" for name in names)

    (part,) = (key for key in copied.list(f"{artifact.prefix}/steps/") if "/model.part-0002" in key)
    copied.put(part, copied.get(part)[:-4] + bytes(4))
    with pytest.raises(DigestMismatch, match=r"part-0002-of-0003\.safetensors does not match its manifest"):
        export_step(copied, "mixtures", "bam", StoreSettings(uri=str(tmp_path / "again")))
    assert not (tmp_path / "again").exists()


def test_another_checkpoint_is_copied_if_the_newest_is_pruned(store: BlobStore, tmp_path: Path) -> None:
    training = PruningStore(store, tmp_path / "run", pruned=1)
    assert export_step(training, "mixtures", "bam", StoreSettings(uri=str(tmp_path / "out"))).step == 4
    assert TensorReader(open_store(str(tmp_path / "out"))).check_digests()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}, "the first copy is deleted"


def test_a_chosen_checkpoint_that_is_pruned_is_an_error(store: BlobStore, tmp_path: Path) -> None:
    training = PruningStore(store, tmp_path / "run", pruned=1)
    with pytest.raises(
        CheckpointError, match=r"/0001.0001-00000004 was pruned while it was copied: .*keep_every to keep"
    ):
        export_step(training, "mixtures", "bam", StoreSettings(uri=str(tmp_path / "out")), step=4)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_number_of_tries_is_limited(store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_export, "MAX_TRIES", 2)
    training = PruningStore(store, tmp_path / "run", pruned=2)
    with pytest.raises(CheckpointError, match="was pruned while it was copied"):
        export_step(training, "mixtures", "bam", StoreSettings(uri=str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_file_is_not_taken_for_pruning(store: BlobStore, tmp_path: Path) -> None:
    damaged = PruningStore(store, tmp_path / "run", pruned=0)
    damaged.delete(next(key for key in damaged.list("mixtures/") if key.endswith("0006/generation_config.json")))
    with pytest.raises(BlobNotFound, match=r"0006/generation_config\.json"):
        export_step(damaged, "mixtures", "bam", StoreSettings(uri=str(tmp_path / "out")))


def test_names_without_a_checkpoint_are_errors(run: Recipe, store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint; its last step is the artifact itself"):
        export_step(store, "branches", "code", StoreSettings(uri=str(tmp_path / "code")))
    with pytest.raises(CheckpointError, match="has 0 artifacts named branches/law"):
        export_step(store, "branches", "law", StoreSettings(uri=str(tmp_path / "law")))
    with pytest.raises(
        SettingsError, match="'corpora/corpus' is not of the form KIND/NAME: KIND must be seeds or branches"
    ):
        app(["export-step", run.store.uri, "corpora/corpus", "--out", "x"], standalone_mode=False)


def test_a_damaged_checkpoint_leaves_no_folder(run: Recipe, store: BlobStore, tmp_path: Path) -> None:
    task = find_task(task_graph(run), "mixtures", "bam")
    key = f"mixtures/{task.id}/steps/0001.0001-00000006/model.safetensors"
    whole = store.get(key)
    store.put(key, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DigestMismatch, match="does not match its manifest"):
        export_step(store, "mixtures", "bam", StoreSettings(uri=str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())
    store.put(key, whole)
