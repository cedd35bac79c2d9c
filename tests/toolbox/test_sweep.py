"""A sweep removes what killed attempts and drivers have left, and nothing that anybody needs."""

import contextlib
import json
import os
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bam_ray.blobs import BlobStore, open_store
from bam_ray.blobs.folder import FolderStore
from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.digests import file_entry
from bam_ray.checkpoint.leases import AttemptNumber, Lease, epoch_key
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.control.drivers import DriverRegistry, heartbeat_key, known_drivers
from bam_ray.errors import StaleLease, StoreDenied
from bam_ray.toolbox.sweep import sweep
from cluster.s3_server import BUCKET
from tests.support.command_line import bam

KIND = ArtifactKind.BRANCHES


def manifest(id: str = "law-1", **more: object) -> Manifest:
    return Manifest.model_validate({"id": id, "kind": KIND, "name": "law", **more})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


class Attempts:
    """Attempts at one artifact, of which some are killed."""

    def __init__(self, store: BlobStore, id: str = "law-1") -> None:
        self.artifact = Artifact(store, KIND, id)
        self._count = 0

    def start(self) -> Lease:
        self._count += 1
        return Lease.take(self.artifact.store, self.artifact.prefix, AttemptNumber(1, self._count))

    def upload(self, lease: Lease, model: Path) -> Manifest:
        """Upload the files of a model, as an attempt does before it commits."""
        folder = self.artifact.new_folder(lease)
        for path in model.iterdir():
            self.artifact.store.put_file(f"{self.artifact.prefix}/{folder}/{path.name}", path)
        files = {path.name: file_entry(path) for path in model.iterdir()}
        return manifest(self.artifact.id, folder=folder).model_copy(update={"files": files})

    def write_checkpoint(self, lease: Lease, step: int, complete: bool = True) -> str:
        prefix = f"{self.artifact.prefix}/steps/{lease.number}-{step:08d}"
        self.artifact.store.put(f"{prefix}/model.safetensors", bytes(100))
        if complete:
            self.artifact.store.put(f"{prefix}/manifest.json", manifest(step=step).to_bytes())
        return prefix


def keys_below(store: BlobStore, prefix: str) -> list[str]:
    return list(store.list(prefix))


def test_files_of_killed_attempts_are_removed_after_a_commit(model: Path) -> None:
    attempts = Attempts(MemoryStore())
    store = attempts.artifact.store
    first, second = attempts.start(), attempts.start()
    committed = attempts.artifact.publish(model, manifest(), second)
    late = attempts.upload(first, model)  # uploads that were under way
    result = sweep(store)
    (removed,) = result.removed
    assert (removed.what, removed.blobs, removed.bytes) == (f"branches/law-1/{late.folder}", 2, 1002)
    assert keys_below(store, f"branches/law-1/{late.folder}") == []
    attempts.artifact.check_files(committed)
    assert sweep(store).removed == ()


def test_the_newest_attempt_can_commit_after_a_sweep(model: Path) -> None:
    attempts = Attempts(MemoryStore())
    old = attempts.upload(attempts.start(), model)
    lease = attempts.start()
    checkpoint = attempts.write_checkpoint(lease, 5, complete=False)
    running = attempts.upload(lease, model)
    (removed,) = sweep(attempts.artifact.store).removed
    assert removed.what == f"branches/law-1/{old.folder}"
    assert keys_below(attempts.artifact.store, checkpoint), "it may be in progress"
    committed = attempts.artifact.publish(model, manifest(), lease)
    attempts.artifact.check_files(committed)
    assert keys_below(attempts.artifact.store, f"branches/law-1/{running.folder}") == [], "an earlier try"


def test_a_stale_attempt_that_was_swept_commits_nothing(model: Path) -> None:
    attempts = Attempts(MemoryStore())

    class SlowLease(Lease):
        def check(self) -> None:
            """Return, and be replaced and swept before the manifest is written."""
            if self.number.count == 1 and attempts.artifact.store.exists(f"{attempts.artifact.prefix}/leases/last"):
                attempts.artifact.store.delete(f"{attempts.artifact.prefix}/leases/last")
                attempts.start()
                sweep(attempts.artifact.store)

    first = attempts.start()
    slow = SlowLease(attempts.artifact.store, attempts.artifact.prefix, first.number)
    uploaded = attempts.upload(first, model)
    attempts.artifact.store.put("branches/law-1/leases/last", b"")
    with pytest.raises(StaleLease, match="its files were swept"):
        attempts.artifact.commit(uploaded, slow)
    assert attempts.artifact.manifest() is None


def test_a_commit_in_progress_is_not_swept(model: Path) -> None:
    class SlowStore(MemoryStore):
        """A store whose put of a manifest takes so long that the attempt is replaced and swept before it arrives."""

        def put_if_absent(self, key: str, data: bytes) -> None:
            if key.endswith("/manifest.json"):
                attempts.start()
                sweep(self)
            super().put_if_absent(key, data)

    attempts = Attempts(SlowStore())
    committed = attempts.artifact.publish(model, manifest(), attempts.start())
    assert attempts.artifact.manifest() == committed
    attempts.artifact.check_files(committed)


def test_unfinished_checkpoints_of_older_attempts_are_removed() -> None:
    attempts = Attempts(MemoryStore())
    first = attempts.start()
    whole, half = attempts.write_checkpoint(first, 5), attempts.write_checkpoint(first, 10, complete=False)
    assert sweep(attempts.artifact.store).removed == (), "the attempt may be running"
    attempts.start()
    (removed,) = sweep(attempts.artifact.store).removed
    assert removed.what == half
    assert len(keys_below(attempts.artifact.store, whole)) == 2


def test_checkpoints_of_a_committed_model_are_removed_as_its_settings_say(model: Path) -> None:
    attempts = Attempts(MemoryStore())
    lease = attempts.start()
    prefixes = [attempts.write_checkpoint(lease, step) for step in (50, 100)]
    settings = {"training": {"keep_every": 100}}
    attempts.artifact.publish(model, manifest(settings=settings), lease)
    (removed,) = sweep(attempts.artifact.store).removed
    assert (removed.what, removed.why) == (prefixes[0], "its artifact is committed")
    assert len(keys_below(attempts.artifact.store, prefixes[1])) == 2


def test_files_that_were_damaged_are_removed_when_made_again(model: Path) -> None:
    attempts = Attempts(MemoryStore())
    damaged = attempts.artifact.publish(model, manifest(), attempts.start())
    attempts.artifact.set_aside(damaged, "a bit has flipped")
    again = attempts.artifact.publish(model, manifest(tokens=1), attempts.start())
    store = attempts.artifact.store
    store.put(attempts.artifact.key(damaged, "model.safetensors"), bytes(10))  # as a killed attempt would leave it
    (removed,) = sweep(store).removed
    assert removed.what.endswith(damaged.folder)
    attempts.artifact.check_files(again)


def test_a_living_driver_keeps_its_newest_attempt(model: Path) -> None:
    attempts = Attempts(MemoryStore())
    store = attempts.artifact.store
    attempts.artifact.publish(model, manifest(), attempts.start())
    newest = attempts.upload(attempts.start(), model)
    registry = DriverRegistry(store, "demo")
    with registry.beating():
        registry.beat()
        result = sweep(store)
    assert ["the driver of demo on" in driver for driver in result.living] == [True]
    assert keys_below(store, f"branches/law-1/{newest.folder}")
    result = sweep(store)
    assert (result.living, result.removed[0].what) == ((), f"branches/law-1/{newest.folder}")


def test_epochs_and_heartbeats_of_old_drivers_are_removed() -> None:
    store = MemoryStore()
    for _ in range(4):
        with DriverRegistry(store, "demo").beating():
            pass
    for epoch in (1, 2, 4):
        description = json.loads(store.get(epoch_key(epoch)))
        old = (datetime.now(UTC) - timedelta(days=3)).isoformat(timespec="seconds")
        store.put(epoch_key(epoch), json.dumps({**description, "taken": old}).encode())
    tokens = {driver.epochs[0]: driver.token for driver in known_drivers(store)}
    assert sum(group.blobs for group in sweep(store).removed) == 4
    left = [epoch_key(epoch) for epoch in (3, 4)] + [heartbeat_key(tokens[epoch]) for epoch in (3, 4)]
    assert sorted(store.list()) == sorted(left)
    assert DriverRegistry(store, "demo").epoch == 5


def test_a_dry_run_removes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    attempts = Attempts(FolderStore(tmp_path / "run"))
    attempts.upload(attempts.start(), model)
    attempts.start()
    before = list(attempts.artifact.store.list())
    assert bam(monkeypatch, "sweep", str(tmp_path / "run"), "--dry-run") == 0
    assert "2 files with 1kB would be removed" in capsys.readouterr().out
    assert list(attempts.artifact.store.list()) == before
    assert bam(monkeypatch, "sweep", str(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "2 files, 1kB (a newer attempt has taken over)" in out and "2 files with 1kB removed" in out
    assert keys_below(attempts.artifact.store, "branches/law-1/files/0001.0001")[0].endswith(".committing")


def test_a_bucket_is_swept_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moto_endpoint: str,
    credentials: Callable[[str, str], None],
    model: Path,
) -> None:
    credentials("any", "any")
    uri = f"s3://{BUCKET}/swept"
    attempts = Attempts(open_store(uri, moto_endpoint))
    store = attempts.artifact.store
    stale = attempts.upload(attempts.start(), model)
    committed = attempts.artifact.publish(model, manifest(), attempts.start())
    attempts.artifact.store.put(attempts.artifact.key(stale, "model.safetensors"), bytes(2000))
    assert bam(monkeypatch, "sweep", uri, "--endpoint", moto_endpoint) == 0
    out = capsys.readouterr().out
    assert f"branches/law-1/{stale.folder}: 1 files, 2kB (another attempt has committed)" in out
    assert keys_below(store, f"branches/law-1/{stale.folder}") == []
    attempts.artifact.check_files(committed)


def test_files_that_were_being_written_are_removed_after_a_day(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("branches/law-1/leases/0001.0001.json", b"{}")
    old, new = (tmp_path / "branches" / "law-1" / f".partial-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(bytes(10))
    os.utime(old, (0, 0))
    assert sweep(store).uploads == ("branches/law-1/.partial-old",)
    assert new.exists() and not old.exists()


def test_a_store_that_does_not_list_uploads_is_swept(model: Path) -> None:
    class DenyingStore(MemoryStore):
        def abort_uploads(self, prefix: str, older_than: timedelta) -> Sequence[str]:
            raise StoreDenied("AccessDenied: s3:ListBucketMultipartUploads")

    attempts = Attempts(DenyingStore())
    attempts.upload(attempts.start(), model)
    attempts.start()
    result = sweep(attempts.artifact.store)
    assert (len(result.removed), result.denied) == (1, "AccessDenied: s3:ListBucketMultipartUploads")


class RandomSchedule:
    """Attempts at several artifacts that start, upload, commit and are swept in a random order."""

    def __init__(self, seed: int, model: Path) -> None:
        self.chance, self.model, self.store = random.Random(seed), model, MemoryStore()
        self.attempts = {id: Attempts(self.store, id) for id in ("law-1", "code-1", "prose-1")}
        self.leases: dict[str, list[Lease]] = {id: [] for id in self.attempts}
        self.uploads: dict[str, list[tuple[Manifest, Lease]]] = {id: [] for id in self.attempts}
        self.acknowledged: dict[str, Manifest] = {}

    def step(self) -> None:
        """Do one thing at one artifact."""
        id = self.chance.choice(list(self.attempts))
        if not self.leases[id] or self.chance.random() < 0.2:
            self.leases[id].append(self.attempts[id].start())
            return
        operation = self.chance.choice([self.upload, self.commit, self.write_checkpoint, self.damage, self.sweep])
        with contextlib.suppress(StaleLease):
            operation(id, self.chance.choice(self.leases[id]))

    def upload(self, id: str, lease: Lease) -> None:
        self.uploads[id].append((self.attempts[id].upload(lease, self.model), lease))

    def commit(self, id: str, lease: Lease) -> None:
        """Commit what any attempt has uploaded, or upload and commit."""
        if self.uploads[id] and self.chance.random() < 0.7:
            self.acknowledged[id] = self.attempts[id].artifact.commit(*self.chance.choice(self.uploads[id]))
        else:
            self.acknowledged[id] = self.attempts[id].artifact.publish(self.model, manifest(id), lease)

    def write_checkpoint(self, id: str, lease: Lease) -> None:
        self.attempts[id].write_checkpoint(lease, self.chance.randrange(1, 9), self.chance.random() < 0.5)

    def damage(self, id: str, lease: Lease) -> None:
        if id in self.acknowledged:
            self.leases[id].append(self.attempts[id].start())
            self.uploads[id] = [each for each in self.uploads[id] if each[1].number < self.leases[id][-1].number]
            self.attempts[id].artifact.set_aside(self.acknowledged.pop(id), "damaged")

    def sweep(self, id: str, lease: Lease) -> None:
        sweep(self.store)

    def finish(self) -> None:
        """Let the newest attempts commit, and sweep."""
        for id, each in self.attempts.items():
            if id not in self.acknowledged:
                newest = max(self.leases[id], key=lambda lease: lease.number) if self.leases[id] else each.start()
                self.acknowledged[id] = each.artifact.publish(self.model, manifest(id), newest)
        sweep(self.store)

    def check(self) -> None:
        """Check that exactly what was acknowledged is committed, and whole."""
        for id, each in self.attempts.items():
            assert each.artifact.manifest() == self.acknowledged.get(id)
            if id in self.acknowledged:
                each.artifact.check_files(self.acknowledged[id])


@pytest.mark.parametrize("seed", range(60))
def test_no_sweep_harms_a_commit_in_any_order(seed: int, model: Path) -> None:
    schedule = RandomSchedule(seed, model)
    for _ in range(80):
        schedule.step()
        schedule.check()
    schedule.finish()
    schedule.check()
    for id, committed in schedule.acknowledged.items():
        folders = {"/".join(key.split("/")[2:4]) for key in schedule.store.list(f"branches/{id}/files/")}
        assert folders == {committed.folder}
