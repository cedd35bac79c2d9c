"""Artifacts are complete or invisible, verified when fetched, and committed only once."""

import itertools
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import CLAIM, Artifact
from bam_ray.checkpoint.digests import file_entry
from bam_ray.checkpoint.leases import AttemptNumber, Lease
from bam_ray.checkpoint.manifest import MANIFEST
from bam_ray.errors import CheckpointError, DigestMismatch, StaleLease, StoreUnavailable
from tests.support.artifact_files import FILES, ID, manifest
from tests.support.leases import next_lease


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


def test_fetch_returns_the_published_files(folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    assert artifact.manifest() is None
    assert not artifact.is_committed()
    written = artifact.publish(folder, manifest(tokens=17))
    assert artifact.is_committed()
    assert artifact.manifest() == written
    assert written.tokens == 17
    assert written.files == {name: file_entry(folder / name) for name in FILES}
    fetched = artifact.fetch(tmp_path / "cache")
    assert {str(path.relative_to(fetched)): path.read_bytes() for path in fetched.rglob("*") if path.is_file()} == FILES
    assert set(store.list()) == {artifact.key(written, name) for name in FILES} | {f"branches/{ID}/{MANIFEST}"}


def test_a_training_checkpoint_is_stored_below_its_artifact(folder: Path) -> None:
    store = MemoryStore()
    step = Artifact(store, "branches", ID, "steps", "0001.0001-00000050")
    step.publish(folder, manifest(step=50))
    assert store.exists(f"branches/{ID}/steps/0001.0001-00000050/{MANIFEST}")
    assert Artifact(store, "branches", ID).manifest() is None


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
    written = artifact.publish(folder, manifest())
    store.put(artifact.key(written, "model.safetensors"), damage)
    for _ in range(2):  # the cache does not return it later either
        with pytest.raises(DigestMismatch, match=r"model\.safetensors does not match its manifest") as caught:
            artifact.fetch(tmp_path / "cache")
        assert "\n" not in str(caught.value)
        assert caught.value.artifact_id == ID
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_missing_blob_is_damage(folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    written = artifact.publish(folder, manifest())
    store.delete(artifact.key(written, "config.json"))
    with pytest.raises(DigestMismatch, match=f"branches/{ID}/config.json is missing, though its manifest names it"):
        artifact.fetch(tmp_path / "cache")
    with pytest.raises(DigestMismatch, match="is missing"):
        artifact.check_files(written)


def test_a_download_that_was_corrupted_once_is_repeated(folder: Path, tmp_path: Path) -> None:
    class FlippingStore(MemoryStore):
        flips = 1

        def get_file(self, key: str, path: Path) -> None:
            super().get_file(key, path)
            if key.endswith("model.safetensors") and self.flips:
                self.flips -= 1
                path.write_bytes(b"other bytes")

    artifact = Artifact(FlippingStore(), "branches", ID)
    artifact.publish(folder, manifest())
    assert (artifact.fetch(tmp_path / "cache") / "model.safetensors").read_bytes() == FILES["model.safetensors"]


@pytest.mark.parametrize("allowed", range(len(FILES) + 1))
def test_a_stale_writer_stops_in_the_middle_of_a_publication(allowed: int, folder: Path) -> None:
    artifact = Artifact(MemoryStore(), "branches", ID)
    checks = itertools.count()

    class LostLease(Lease):
        def check(self) -> None:
            if next(checks) == allowed:  # the network was lost here
                raise StaleLease("attempt 2 took over")

    with pytest.raises(StaleLease):
        artifact.publish(folder, manifest(), LostLease(artifact.store, artifact.prefix, AttemptNumber(1, 1)))
    assert artifact.manifest() is None
    # The file of the failed check is not written; files that were not started may be missing too
    assert len(list(artifact.store.list())) <= len(FILES) - (allowed < len(FILES))


def test_a_late_write_of_a_stale_attempt_damages_nothing(folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    stale = next_lease(store, artifact.prefix)
    late = Artifact(DelayedStore(store), "branches", ID)
    with ThreadPoolExecutor() as pool:
        publication = pool.submit(late.publish, folder, manifest(), stale)
        late.store.blocked.wait(10.0)
        newer = folder.with_name("newer")
        shutil.copytree(folder, newer)
        (newer / "config.json").write_bytes(b'{"measured": 2}')  # attempts differ in what they measure
        written = artifact.publish(newer, manifest(), next_lease(store, artifact.prefix))
        late.store.go_on.set()
        with pytest.raises(StaleLease):
            publication.result()
    artifact.check_files(written)
    assert (artifact.fetch(tmp_path / "cache") / "config.json").read_bytes() == b'{"measured": 2}'


class DelayedStore:
    """A store whose first upload of a file waits for `go_on`, as if the process had been stopped."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.blocked, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def put_file(self, key: str, path: Path) -> None:
        self.blocked.set()
        assert self.go_on.wait(10.0)
        self._store.put_file(key, path)


def test_the_files_of_older_attempts_are_deleted_at_the_commit(folder: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    older = next_lease(store, artifact.prefix)
    store.put(f"{artifact.prefix}/{artifact.new_folder(older)}/config.json", b"{}")
    lease = next_lease(store, artifact.prefix)
    store.put(f"{artifact.prefix}/{artifact.new_folder(lease)}/config.json", b"of an earlier try")
    newer = f"{artifact.prefix}/files/{AttemptNumber(9, 1)}-00/config.json"
    store.put(newer, b"of a newer attempt")
    written = artifact.publish(folder, manifest(), lease)
    kept = {artifact.key(written, name) for name in (*FILES, CLAIM)} | {newer}
    assert set(store.list(f"{artifact.prefix}/files/")) == kept


def test_the_loser_of_a_race_deletes_its_own_files(folder: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    first = artifact.publish(folder, manifest())
    assert artifact.publish(folder, manifest()) == first
    assert set(store.list(f"{artifact.prefix}/files/")) == {artifact.key(first, name) for name in FILES}


def test_a_damaged_artifact_is_set_aside_and_made_again(folder: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    artifact = Artifact(store, "branches", ID)
    for generation in range(3):
        written = artifact.publish(folder, manifest(), next_lease(store, artifact.prefix))
        artifact.check_files(written)
        store.put(artifact.key(written, "config.json"), b"damaged")
        with pytest.raises(DigestMismatch):
            artifact.fetch(tmp_path / "cache")
        artifact.set_aside(written, "config.json does not match")
        artifact.set_aside(written, "somebody else found it too")
        assert artifact.manifest() is None and not artifact.is_committed()
        assert store.get(f"{artifact.prefix}/manifest-{generation:04d}.damaged.json") == b"config.json does not match\n"
    written = artifact.publish(folder, manifest(), next_lease(store, artifact.prefix))
    assert artifact.manifest() == written
    assert (artifact.fetch(tmp_path / "cache") / "config.json").read_bytes() == FILES["config.json"]
    assert set(store.list(f"{artifact.prefix}/files/")) == {artifact.key(written, name) for name in (*FILES, CLAIM)}


def test_a_manifest_that_was_replaced_is_not_set_aside(folder: Path) -> None:
    artifact = Artifact(MemoryStore(), "branches", ID)
    first = artifact.publish(folder, manifest())
    artifact.set_aside(first, "damaged")
    second = artifact.publish(folder, manifest())
    artifact.set_aside(first, "the reader was late")
    assert artifact.manifest() == second


def test_the_first_of_two_commits_wins() -> None:
    artifact = Artifact(MemoryStore(), "branches", ID)
    first, second = manifest(attempt="0001.0001"), manifest(attempt="0001.0002")
    assert artifact.commit(first) == first
    assert artifact.commit(second) == first
    assert artifact.manifest() == first
