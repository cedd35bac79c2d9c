"""Artifacts are complete or invisible, verified when fetched, and committed only once."""

import errno
import fcntl
import itertools
import multiprocessing
import os
import shutil
import signal
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace

import pytest

from bam_ray.blobs.folder import FolderStore
from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact, cache_folder, file_entry
from bam_ray.checkpoint.manifest import MANIFEST, Manifest
from bam_ray.errors import BlobNotFound, CheckpointError, DigestMismatch, StaleLease, StoreError, StoreUnavailable

ID = "code-0123456789ab"
FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "tokenizer/vocab.json": b"[1]"}


class FailingStore(MemoryStore):
    """A store whose put number `broken`, of any type, fails as if the disk were full."""

    def __init__(self, broken: int) -> None:
        super().__init__("failing")
        self._puts_left = broken - 1

    def _count(self) -> None:
        if self._puts_left == 0:
            raise StoreUnavailable("the disk is full")
        self._puts_left -= 1

    def put(self, key: str, data: bytes) -> None:
        self._count()
        super().put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> None:
        self._count()
        super().put_if_absent(key, data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of files, one of them in a subfolder."""
    folder = tmp_path / "made"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def manifest(**more: object) -> Manifest:
    return Manifest.model_validate({"id": ID, "kind": "branches", "name": "code", **more})


def test_fetch_returns_the_published_files(folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    assert artifact.manifest() is None
    written = artifact.publish(folder, manifest(tokens=17))
    assert artifact.manifest() == written
    assert written.tokens == 17
    assert written.files == {name: file_entry(folder / name) for name in FILES}
    fetched = artifact.fetch(tmp_path / "cache")
    assert {str(path.relative_to(fetched)): path.read_bytes() for path in fetched.rglob("*") if path.is_file()} == FILES
    assert set(store.list()) == {f"branches/{ID}/{name}" for name in (*FILES, MANIFEST)}


def test_a_training_checkpoint_is_stored_below_its_artifact(folder: Path) -> None:
    store = MemoryStore()
    step = Artifact(store, "branches", ID, "steps", "0001-00000050")
    step.publish(folder, manifest(step=50))
    assert store.exists(f"branches/{ID}/steps/0001-00000050/{MANIFEST}")
    assert Artifact(store, "branches", ID).manifest() is None


def test_a_second_fetch_returns_the_cached_folder(folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    artifact.publish(folder, manifest())
    first = artifact.fetch(tmp_path / "cache")
    for name in FILES:
        store.delete(f"branches/{ID}/{name}")
    assert artifact.fetch(tmp_path / "cache") == first


def test_the_cache_distinguishes_manifests_of_the_same_id(folder: Path, tmp_path: Path) -> None:
    fetched = []
    for data in (b"before", b"after"):
        store = MemoryStore("wiped and filled again")
        (folder / "config.json").write_bytes(data)
        artifact = Artifact(store, "branches", ID)
        artifact.publish(folder, manifest(created="2026-01-01T00:00:00+00:00"))
        fetched.append((artifact.fetch(tmp_path / "cache") / "config.json").read_bytes())
    assert fetched == [b"before", b"after"]


@pytest.mark.parametrize("broken", range(1, len(FILES) + 2))
def test_a_crash_before_the_manifest_commits_nothing(broken: int, folder: Path, tmp_path: Path) -> None:
    store = FailingStore(broken)
    artifact = Artifact(store, "branches", ID)
    with pytest.raises(StoreUnavailable, match="disk is full"):
        artifact.publish(folder, manifest())
    assert artifact.manifest() is None
    with pytest.raises(CheckpointError, match=r"is not committed .*run the stage that makes it"):
        artifact.fetch(tmp_path / "cache")
    store._puts_left = -1  # the disk has space again
    artifact.publish(folder, manifest())
    assert (artifact.fetch(tmp_path / "cache") / "config.json").read_bytes() == FILES["config.json"]


@pytest.mark.parametrize("damage", [b"", b"\0" * 10240, FILES["model.safetensors"][:-1]], ids=["empty", "other", "cut"])
def test_a_damaged_blob_is_never_returned(damage: bytes, folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    artifact.publish(folder, manifest())
    store.put(f"branches/{ID}/model.safetensors", damage)
    for _ in range(2):  # the cache does not return it later either
        with pytest.raises(DigestMismatch, match=r"model\.safetensors does not match its manifest") as caught:
            artifact.fetch(tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


SPAWN = multiprocessing.get_context("spawn")


class RecordingStore(FolderStore):
    """A store that returns the manifest when both processes have asked for it, and records which files are read."""

    def __init__(self, folder: Path, both: Barrier) -> None:
        super().__init__(folder)
        self._both, self._read = both, folder.with_name("read")

    def get(self, key: str) -> bytes:
        self._both.wait()
        return super().get(key)

    def get_file(self, key: str, path: Path) -> None:
        with self._read.open("a") as file:
            file.write(f"{key}\n")
        time.sleep(0.2)  # long enough for the other process to interfere
        super().get_file(key, path)


class KillingStore(FolderStore):
    """A store that kills the process that reads a file while the other process waits."""

    def __init__(self, folder: Path, both: Barrier) -> None:
        super().__init__(folder)
        self._both = both

    def get_file(self, key: str, path: Path) -> None:
        self._both.wait()
        time.sleep(0.2)  # by now the other process waits for this one
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("first", [RecordingStore, KillingStore])
def test_one_process_downloads_and_the_others_wait(
    first: type[RecordingStore | KillingStore], folder: Path, tmp_path: Path
) -> None:
    stored, cache, both = tmp_path / "store", tmp_path / "cache", SPAWN.Barrier(2)
    Artifact(FolderStore(stored), "branches", ID).publish(folder, manifest())
    stores = [first(stored, both), RecordingStore(stored, both)]
    processes = [SPAWN.Process(target=Artifact(store, "branches", ID).fetch, args=(cache,)) for store in stores]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if first is KillingStore else 0, 0]
    read = (tmp_path / "read").read_text().splitlines()
    assert sorted(read) == sorted(f"branches/{ID}/{name}" for name in FILES), "each file is read once"
    (fetched,) = [path for path in cache.iterdir() if not path.name.startswith(".")]
    assert {name: (fetched / name).read_bytes() for name in FILES} == FILES


def test_a_cache_without_file_locks_is_filled(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    artifact = Artifact(MemoryStore(), "branches", ID)
    artifact.publish(folder, manifest())
    assert (artifact.fetch(tmp_path / "cache") / "config.json").read_bytes() == FILES["config.json"]


def test_a_full_cache_disk_is_not_an_error_of_the_artifact(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact(MemoryStore(), "branches", ID)
    artifact.publish(folder, manifest())
    size = sum(len(data) for data in FILES.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with pytest.raises(
        StoreError, match=rf"has {size - 1:,} bytes free but .*{ID} needs {size:,}: free space"
    ) as caught:
        artifact.fetch(tmp_path / "cache")
    assert not isinstance(caught.value, CheckpointError), "a CheckpointError would mean that the checkpoint is damaged"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    assert artifact.fetch(tmp_path / "cache").is_dir()


@pytest.mark.parametrize("allowed", range(len(FILES) + 1))
def test_a_stale_writer_stops_in_the_middle_of_a_publication(allowed: int, folder: Path) -> None:
    artifact = Artifact(MemoryStore(), "branches", ID)
    checks = itertools.count()

    def check() -> None:
        if next(checks) == allowed:  # the network was lost here
            raise StaleLease("attempt 2 took over")

    with pytest.raises(StaleLease):
        artifact.publish(folder, manifest(), check)
    assert artifact.manifest() is None
    # The file of the failed check is not written; files that were not started may be missing too
    assert len(list(artifact.store.list())) <= len(FILES) - (allowed < len(FILES))


def test_fetch_names_a_missing_blob(folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    artifact.publish(folder, manifest())
    store.delete(f"branches/{ID}/config.json")
    with pytest.raises(BlobNotFound, match=f"branches/{ID}/config.json"):
        artifact.fetch(tmp_path / "cache")


def test_the_first_of_two_commits_wins() -> None:
    artifact = Artifact(MemoryStore(), "branches", ID)
    first, second = manifest(attempt=1), manifest(attempt=2)
    assert artifact.commit(first) == first
    assert artifact.commit(second) == first
    assert artifact.manifest() == first


def test_the_environment_sets_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("BAM_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "bam_ray"
