"""Thousands of random schedules of attempts, with lost answers and killed processes, never damage what is committed."""

import contextlib
from pathlib import Path

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint import artifacts
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import AttemptNumber, Lease
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest
from bam_ray.errors import DigestMismatch, StaleLease, StoreUnavailable
from tests.support.schedules.scheduler import Faults, ScheduledStore, Scheduler, SerialExecutor, write_files

ID = "code-0123456789ab"
KIND = ArtifactKind.BRANCHES
TRIES = 3
FAULTS = Faults(fails=0.03, answer_is_lost=0.05, killed=0.03)
RARE_FAULTS = Faults(fails=0.005, answer_is_lost=0.01, killed=0.005)


@pytest.fixture(autouse=True)
def one_thread_per_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "ThreadPoolExecutor", SerialExecutor)


class Schedule:
    """Attempts at one artifact that run in an order which `seed` decides."""

    def __init__(self, seed: int, folder: Path, faults: Faults) -> None:
        self.store = MemoryStore()
        self.truth = Artifact(self.store, KIND, ID)  # reads the store directly
        self.rotten: set[str] = set()  # folders with a file that this test has damaged
        self.acknowledged = 0
        self._folder = folder
        self.scheduler = Scheduler(seed, self.store, faults, self.check)

    def check(self) -> None:
        """Assert that the committed artifact is whole."""
        manifest = self.truth.manifest()
        if manifest is not None and manifest.folder not in self.rotten:
            self.truth.check_files(manifest)

    def attempt(self, count: int, suspect: bool = False) -> None:
        """Start attempt number `count`, which publishes files of its own."""
        folder = write_files(self._folder / str(count), f"attempt {count}")
        self.scheduler.start(lambda store: self._publish(store, folder, AttemptNumber(1, count), suspect))

    def damage(self) -> None:
        """Change a committed file, as a broken disk of the store would."""
        manifest = self.truth.manifest()
        if manifest is not None and manifest.folder not in self.rotten:
            self.rotten.add(manifest.folder)
            self.store.put(self.truth.key(manifest, "curve.json"), b"rot")

    def _publish(self, store: ScheduledStore, folder: Path, number: AttemptNumber, suspect: bool) -> None:
        artifact = Artifact(store, KIND, ID)  # type: ignore[arg-type]
        with contextlib.suppress(StaleLease, StoreUnavailable):
            if suspect:
                self._set_aside_if_damaged(artifact)
            lease = Lease.take(store, artifact.prefix, number)  # type: ignore[arg-type]
            for _ in range(TRIES):
                with contextlib.suppress(StoreUnavailable):
                    manifest = Manifest(id=ID, kind=KIND, name="code", attempt=str(number))
                    artifact.publish(folder, manifest, lease)
                    self.acknowledged += 1
                    return

    def _set_aside_if_damaged(self, artifact: Artifact) -> None:
        manifest = artifact.manifest()
        if manifest is not None:
            try:
                artifact.check_files(manifest)
            except DigestMismatch as error:
                artifact.set_aside(manifest, str(error))


@pytest.mark.parametrize("chunk", range(10))
def test_what_one_attempt_commits_no_other_attempt_damages(chunk: int, tmp_path: Path) -> None:
    for seed in range(chunk * 100, chunk * 100 + 100):
        schedule = Schedule(seed, tmp_path, FAULTS)
        for count in range(1, 2 + seed % 3 + 1):
            schedule.attempt(count)
        schedule.scheduler.finish()
        if schedule.acknowledged:
            assert schedule.truth.is_committed(), f"seed {seed}: an acknowledged commit was lost"
        last = Schedule(seed, tmp_path, Faults())
        last.store, last.truth = schedule.store, schedule.truth
        last.scheduler = Scheduler(seed, schedule.store, Faults(), last.check)
        last.attempt(100)
        last.scheduler.finish()
        assert last.acknowledged == 1, f"seed {seed}: a healthy attempt could not finish"


@pytest.mark.parametrize("chunk", range(10))
def test_a_damaged_artifact_is_repaired_in_any_schedule(chunk: int, tmp_path: Path) -> None:
    repaired = 0
    for seed in range(chunk * 100, chunk * 100 + 100):
        schedule = Schedule(seed, tmp_path, RARE_FAULTS)
        schedule.attempt(1)
        schedule.attempt(2)
        started = 2
        while schedule.scheduler.step():
            draw = schedule.scheduler.random.random()
            if draw < 0.2:
                schedule.damage()
            elif draw < 0.35 and started < 8:
                started += 1
                schedule.attempt(started, suspect=True)
        schedule.scheduler.finish()
        after = Schedule(seed, tmp_path, Faults())
        after.store, after.truth, after.rotten = schedule.store, schedule.truth, set()
        after.scheduler = Scheduler(seed, schedule.store, Faults(), lambda: None)
        after.attempt(9, suspect=True)
        after.scheduler.finish()
        after.check()
        assert after.truth.is_committed(), f"seed {seed}"
        repaired += bool(schedule.rotten)
    assert repaired > 50, "the schedules must contain damage"
