"""The event files of a run read as one curve, whatever happened while they were written."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.errors import StoreUnavailable
from bam_ray.settings import MetricsSettings
from bam_ray.training import curves
from bam_ray.training.curves import CurveWriter
from bam_ray.training.flops import peak_flops

PREFIX = "branches/code-1"


def open_curve(store: MemoryStore) -> CurveWriter:
    curve = CurveWriter(MetricsSettings(), Artifact(store, "branches", "code-1"), "code", 1)
    curve.open(0)
    return curve


def shown(store: MemoryStore, folder: Path) -> list[tuple[int, float]]:
    for key in store.list(f"{PREFIX}/tensorboard/"):
        store.get_file(key, folder / key.rpartition("/")[2])
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return [(point.step, point.value) for point in found.Scalars("loss/nll")]


def write(curve: CurveWriter, steps: range, value: float) -> None:
    for step in steps:
        curve.write(step, {"loss/nll": value})


def test_a_rollback_removes_the_later_steps(tmp_path: Path) -> None:
    store = MemoryStore()
    curve = open_curve(store)
    write(curve, range(1, 7), 1.0)
    curve.roll_back(4)
    write(curve, range(5, 9), 2.0)
    curve.close()
    assert shown(store, tmp_path) == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 9)]


def test_long_curves_are_split_into_files_and_shown_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "MAX_FILE_BYTES", 0)
    store = MemoryStore()
    curve = open_curve(store)
    write(curve, range(1, 2002), 1.0)
    curve.close()
    assert len(list(store.list(f"{PREFIX}/tensorboard/"))) == 3
    assert [step for step, _ in shown(store, tmp_path)] == list(range(1, 2002))


def test_an_unavailable_store_loses_no_step(tmp_path: Path) -> None:
    class UnavailableStore(MemoryStore):
        unavailable = True

        def put_file(self, key: str, path: Path) -> None:
            if self.unavailable:
                raise StoreUnavailable("no S3 server answers")
            super().put_file(key, path)

    store = UnavailableStore()
    curve = open_curve(store)
    write(curve, range(1, 4), 1.0)
    curve.roll_back(2)
    write(curve, range(3, 5), 1.0)
    store.unavailable = False
    curve.close()
    assert [step for step, _ in shown(store, tmp_path)] == [1, 2, 3, 4]


def test_peak_flops_by_device_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 NVL") == 835e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("cpu") is None
