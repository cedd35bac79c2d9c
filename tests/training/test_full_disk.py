"""A full local disk ends the curves, but not the run."""

import errno
import threading
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.settings import MetricsSettings
from bam_ray.training.curves import CurveWriter


def test_a_full_disk_ends_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's own thread dies of the error
    store = MemoryStore()
    curves = CurveWriter(MetricsSettings(), Artifact(store, "branches", "x"), "x", 1)
    curves.open(0)
    curves.write(1, {"loss/nll": 1.0})
    curves.flush()
    written = {key: store.get(key) for key in store.list()}
    assert len(written) == 1

    def full(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(2, 40):
        curves.write(step, {"loss/nll": 1.0})
    curves.flush()
    curves.roll_back(20)
    curves.close()
    assert {key: store.get(key) for key in store.list()} == written
    assert list(tmp_path.iterdir()) == [], "the files were not deleted"


def test_a_disk_that_is_full_from_the_start_allows_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    store = MemoryStore()
    curves = CurveWriter(MetricsSettings(), Artifact(store, "branches", "x"), "x", 1)
    curves.open(0)
    curves.write(1, {"loss/nll": 1.0})
    curves.close()
    assert list(store.list()) == []
