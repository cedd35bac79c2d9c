"""A disk without room: curves end, runs do not."""

import errno
import threading
from pathlib import Path

import pytest
from bam_ray.training.metrics import Metrics
from tensorboard.summary.writer.record_writer import RecordWriter

from bam_ray.blobs.memory import MemoryStore
from bam_ray.settings import MetricsSettings


def test_a_curve_ends_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of TensorBoard's own thread, which dies of it
    store = MemoryStore()
    metrics = Metrics(MetricsSettings(), store, "branches/x", "x", 1, 0)
    metrics.write(1, {"loss/nll": 1.0})
    metrics.flush()
    written = {key: store.get(key) for key in store.list()}
    assert len(written) == 1

    def full(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(2, 40):
        metrics.write(step, {"loss/nll": 1.0})
    metrics.flush()
    metrics.go_back(20)
    metrics.close()
    assert {key: store.get(key) for key in store.list()} == written
    assert list(tmp_path.iterdir()) == [], "its room is given back"


def test_a_disk_that_is_full_from_the_start_is_no_reason_not_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    store = MemoryStore()
    metrics = Metrics(MetricsSettings(), store, "branches/x", "x", 1, 0)
    metrics.write(1, {"loss/nll": 1.0})
    metrics.close()
    assert list(store.list()) == []
