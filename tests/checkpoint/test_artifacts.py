"""Artifacts: whole or invisible, verified when fetched, the same wherever they are committed twice."""

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
    """A store whose `broken`-th put, of whatever sort, fails, as where a disk is full or a process killed."""

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
    """A folder of files, one of them in a folder of its own."""
    folder = tmp_path / "made"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def manifest(**more: object) -> Manifest:
    return Manifest.model_validate({"id": ID, "kind": "branches", "name": "code", **more})


def test_what_is_published_is_fetched(folder: Path, tmp_path: Path) -> None:
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


def test_a_step_of_an_artifact_lies_below_it(folder: Path) -> None:
    store = MemoryStore()
    step = Artifact(store, "branches", ID, "steps", "0001-00000050")
    step.publish(folder, manifest(step=50))
    assert store.exists(f"branches/{ID}/steps/0001-00000050/{MANIFEST}")
    assert Artifact(store, "branches", ID).manifest() is None


def test_a_second_fetch_takes_the_first_ones_folder(folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    artifact.publish(folder, manifest())
    first = artifact.fetch(tmp_path / "cache")
    for name in FILES:
        store.delete(f"branches/{ID}/{name}")
    assert artifact.fetch(tmp_path / "cache") == first


def test_the_cache_does_not_take_another_content_for_this_one(folder: Path, tmp_path: Path) -> None:
    fetched = []
    for data in (b"before", b"after"):
        store = MemoryStore("wiped and filled anew")
        (folder / "config.json").write_bytes(data)
        artifact = Artifact(store, "branches", ID)
        artifact.publish(folder, manifest(created="2026-01-01T00:00:00+00:00"))
        fetched.append((artifact.fetch(tmp_path / "cache") / "config.json").read_bytes())
    assert fetched == [b"before", b"after"]


@pytest.mark.parametrize("broken", range(1, len(FILES) + 2))
def test_a_crash_before_the_manifest_leaves_nothing_visible(broken: int, folder: Path, tmp_path: Path) -> None:
    store = FailingStore(broken)
    artifact = Artifact(store, "branches", ID)
    with pytest.raises(StoreUnavailable, match="disk is full"):
        artifact.publish(folder, manifest())
    assert artifact.manifest() is None
    with pytest.raises(CheckpointError, match=r"is not committed .*run the stage that makes it"):
        artifact.fetch(tmp_path / "cache")
    store._puts_left = -1  # the disk has room again
    artifact.publish(folder, manifest())
    assert (artifact.fetch(tmp_path / "cache") / "config.json").read_bytes() == FILES["config.json"]


@pytest.mark.parametrize("damage", [b"", b"\0" * 10240, FILES["model.safetensors"][:-1]], ids=["empty", "other", "cut"])
def test_a_damaged_blob_is_never_handed_out(damage: bytes, folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    artifact.publish(folder, manifest())
    store.put(f"branches/{ID}/model.safetensors", damage)
    for _ in range(2):  # nor by the cache the next time
        with pytest.raises(DigestMismatch, match=r"model\.safetensors does not match its manifest") as caught:
            artifact.fetch(tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


SPAWN = multiprocessing.get_context("spawn")


class Counted(FolderStore):
    """Hands out the manifest when two processes are there, and writes down which file is read."""

    def __init__(self, folder: Path, both: Barrier) -> None:
        super().__init__(folder)
        self._both, self._read = both, folder.with_name("read")

    def get(self, key: str) -> bytes:
        self._both.wait()
        return super().get(key)

    def get_file(self, key: str, path: Path) -> None:
        with self._read.open("a") as file:
            file.write(f"{key}\n")
        time.sleep(0.2)  # long enough for the other to come in between
        super().get_file(key, path)


class Deadly(FolderStore):
    """Kills the process that reads a file, when another is there."""

    def __init__(self, folder: Path, both: Barrier) -> None:
        super().__init__(folder)
        self._both = both

    def get_file(self, key: str, path: Path) -> None:
        self._both.wait()
        time.sleep(0.2)  # the other waits for this one by now
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("first", [Counted, Deadly])
def test_of_the_processes_of_a_node_one_downloads_and_another_waits_for_it(
    first: type[Counted | Deadly], folder: Path, tmp_path: Path
) -> None:
    stored, cache, both = tmp_path / "store", tmp_path / "cache", SPAWN.Barrier(2)
    Artifact(FolderStore(stored), "branches", ID).publish(folder, manifest())
    stores = [first(stored, both), Counted(stored, both)]
    processes = [SPAWN.Process(target=Artifact(store, "branches", ID).fetch, args=(cache,)) for store in stores]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if first is Deadly else 0, 0]
    read = (tmp_path / "read").read_text().splitlines()
    assert sorted(read) == sorted(f"branches/{ID}/{name}" for name in FILES), "each file once"
    (fetched,) = [path for path in cache.iterdir() if not path.name.startswith(".")]
    assert {name: (fetched / name).read_bytes() for name in FILES} == FILES


def test_where_the_cache_knows_no_locks_it_is_filled_all_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    artifact = Artifact(MemoryStore(), "branches", ID)
    artifact.publish(folder, manifest())
    assert (artifact.fetch(tmp_path / "cache") / "config.json").read_bytes() == FILES["config.json"]


def test_a_cache_without_room_is_said_and_no_fault_of_the_artifact(
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
    assert not isinstance(caught.value, CheckpointError), "a checkpoint would be taken for a damaged one"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    assert artifact.fetch(tmp_path / "cache").is_dir()


@pytest.mark.parametrize("allowed", range(len(FILES) + 1))
def test_one_that_may_not_write_any_more_writes_nothing_over_what_was_made_since(allowed: int, folder: Path) -> None:
    artifact = Artifact(MemoryStore(), "branches", ID)
    asked = itertools.count()

    def check() -> None:
        if next(asked) == allowed:  # cut off here for a while
            raise StaleLease("attempt 2 took over")

    with pytest.raises(StaleLease):
        artifact.publish(folder, manifest(), check)
    assert artifact.manifest() is None
    # The one that was cut off is not written; those whose turn had not come may be left out too
    assert len(list(artifact.store.list())) <= len(FILES) - (allowed < len(FILES))


def test_a_missing_blob_is_named(folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    artifact.publish(folder, manifest())
    store.delete(f"branches/{ID}/config.json")
    with pytest.raises(BlobNotFound, match=f"branches/{ID}/config.json"):
        artifact.fetch(tmp_path / "cache")


def test_the_first_of_two_commits_stands() -> None:
    artifact = Artifact(MemoryStore(), "branches", ID)
    first, second = manifest(attempt=1), manifest(attempt=2)
    assert artifact.commit(first) == first
    assert artifact.commit(second) == first
    assert artifact.manifest() == first


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("BAM_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "bam_ray"
