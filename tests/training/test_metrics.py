"""Event files are read as one curve, whatever happened while they were written."""

from pathlib import Path

import pytest
from bam_ray.training.metrics import Metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bam_ray.blobs.memory import MemoryStore
from bam_ray.errors import StoreUnavailable
from bam_ray.settings import MetricsSettings
from bam_ray.training import metrics
from bam_ray.training.flops import peak_flops

PREFIX = "branches/code-1"


def shown(store: MemoryStore, folder: Path) -> list[tuple[int, float]]:
    for key in store.list(f"{PREFIX}/tensorboard/"):
        store.get_file(key, folder / key.rpartition("/")[2])
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return [(point.step, point.value) for point in found.Scalars("loss/nll")]


def write(curve: Metrics, steps: range, value: float) -> None:
    for step in steps:
        curve.write(step, {"loss/nll": value})


def test_a_rollback_forgets_what_came_after(tmp_path: Path) -> None:
    store = MemoryStore()
    curve = Metrics(MetricsSettings(), store, PREFIX, "code", 1, 0)
    write(curve, range(1, 7), 1.0)
    curve.go_back(4)
    write(curve, range(5, 9), 2.0)
    curve.close()
    assert shown(store, tmp_path) == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 9)]


def test_long_curves_are_cut_in_files_and_shown_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LARGEST_FILE", 0)
    store = MemoryStore()
    curve = Metrics(MetricsSettings(), store, PREFIX, "code", 1, 0)
    write(curve, range(1, 2002), 1.0)
    curve.close()
    assert len(list(store.list(f"{PREFIX}/tensorboard/"))) == 3
    assert [step for step, _ in shown(store, tmp_path)] == list(range(1, 2002))


def test_a_store_that_is_away_costs_no_curve(tmp_path: Path) -> None:
    class Away(MemoryStore):
        away = True

        def put_file(self, key: str, path: Path) -> None:
            if self.away:
                raise StoreUnavailable("no S3 server answers")
            super().put_file(key, path)

    store = Away()
    curve = Metrics(MetricsSettings(), store, PREFIX, "code", 1, 0)
    write(curve, range(1, 4), 1.0)
    curve.go_back(2)
    write(curve, range(3, 5), 1.0)
    store.away = False
    curve.close()
    assert [step for step, _ in shown(store, tmp_path)] == [1, 2, 3, 4]


def test_peaks_are_known_by_the_device_s_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("cpu") is None
