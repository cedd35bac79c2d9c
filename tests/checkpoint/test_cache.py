"""The cache of fetched artifacts is shared, bounded, and repaired after crashes."""

import errno
import fcntl
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
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.cache import cache_folder
from bam_ray.errors import CheckpointError, StoreError
from tests.support.artifact_files import FILES, ID, manifest

SIZE = sum(len(data) for data in FILES.values())


def test_a_second_fetch_returns_the_cached_folder(folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    written = artifact.publish(folder, manifest())
    first = artifact.fetch(tmp_path / "cache")
    for name in FILES:
        store.delete(artifact.key(written, name))
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
    artifact = Artifact(FolderStore(stored), "branches", ID)
    written = artifact.publish(folder, manifest())
    stores = [first(stored, both), RecordingStore(stored, both)]
    processes = [SPAWN.Process(target=Artifact(store, "branches", ID).fetch, args=(cache,)) for store in stores]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if first is KillingStore else 0, 0]
    read = (tmp_path / "read").read_text().splitlines()
    assert sorted(read) == sorted(artifact.key(written, name) for name in FILES), "each file is read once"
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


def test_the_environment_sets_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("BAM_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "bam_ray"


@pytest.mark.parametrize("damage", [b"", b"other" * 2048, None], ids=["cut", "other bytes", "deleted"])
def test_a_cached_file_that_changed_is_downloaded_again(damage: bytes | None, folder: Path, tmp_path: Path) -> None:
    artifact = Artifact(MemoryStore(), "branches", ID)
    artifact.publish(folder, manifest())
    cached = artifact.fetch(tmp_path / "cache") / "model.safetensors"
    cached.unlink()
    if damage is not None:
        cached.write_bytes(damage)
    assert (artifact.fetch(tmp_path / "cache") / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_files_are_flushed_to_the_disk_before_the_folder_is_visible(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    artifact = Artifact(MemoryStore(), "branches", ID)
    artifact.publish(folder, manifest())
    artifact.fetch(tmp_path / "cache")
    names = [name for path in flushed for name in FILES if path.endswith(f"/{name}")]
    assert sorted(names) == sorted(FILES)
    assert flushed[-1] == str(tmp_path / "cache"), "the rename itself is flushed last"


def publish_many(store: MemoryStore, folder: Path, count: int) -> list[Artifact]:
    artifacts = [Artifact(store, "branches", f"code-{number:012d}") for number in range(count)]
    for artifact in artifacts:
        artifact.publish(folder, manifest(id=artifact.id))
    return artifacts


def fetch_elsewhere(artifact: Artifact, cache: Path) -> None:
    """Fetch in a process that has ended when this returns, so that it holds no locks."""
    process = SPAWN.Process(target=artifact.fetch, args=(cache,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_cache_evicts_what_was_not_used_for_longest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    store = FolderStore(tmp_path / "store")
    oldest, held, third, fourth = publish_many(store, folder, 4)
    monkeypatch.setenv("BAM_CACHE_GIB", str(3.5 * SIZE / (1 << 30)))
    held_folder = held.fetch(cache)
    fetch_elsewhere(oldest, cache)
    fetch_elsewhere(third, cache)
    os.utime(held_folder, (0, 0))  # not used for the longest time, but this process reads it
    fetch_elsewhere(fourth, cache)
    folders = {path for path in cache.iterdir() if not path.name.startswith(".")}
    assert len(folders) == 3 and held_folder in folders
    (cache / "before").touch()
    kept = {path.name for path in folders}
    fetch_elsewhere(third, cache)
    assert {path.name for path in cache.iterdir() if path.is_dir()} >= kept, "third was still there"


def test_what_a_killed_download_left_is_swept(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    artifact = Artifact(MemoryStore(), "branches", ID)
    artifact.publish(folder, manifest())
    fetched = artifact.fetch(cache)
    shutil.rmtree(fetched)
    partial = cache / f".{fetched.name}.partial-abc"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    artifact.fetch(cache)
    assert not partial.exists()
