"""The progress of upcycling: the fitting of routers is a phase of its own, with its own steps and ETA."""

from pathlib import Path

import pytest

from bam_ray.blobs import open_store
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.errors import Interrupted
from bam_ray.pipeline.tasks import Progress
from bam_ray.stages.upcycle import UpcyclingProgress
from bam_ray.units import MIB
from tests.support.stage_run import RecordingContext, make_artifacts, run_task, small_recipe

FITTED = "layers whose routers are fitted to text"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAM_CACHE", str(tmp_path / "cache"))


def test_each_phase_has_its_own_eta() -> None:
    context, now = RecordingContext(), [0.0]
    progress = UpcyclingProgress("bam", context, clock=lambda: now[0])
    for now[0], done, phase in (
        (0.0, 0, "writing"),
        (10.0, 75 * MIB, "writing"),
        (12.0, 0, "fitting routers"),
        (112.0, 2, "fitting routers"),
        (212.0, 4, "fitting routers"),
    ):
        progress(done, 100 * MIB if phase == "writing" else 10, phase)  # type: ignore[arg-type]
    assert context.reports == [
        Progress(0, 100, note="MiB written"),
        Progress(75, 100, note="MiB written", eta_seconds=pytest.approx(10.0 / 3)),
        Progress(0, 10, note=FITTED),
        Progress(2, 10, note=FITTED, eta_seconds=400.0),
        Progress(4, 10, note=FITTED, eta_seconds=300.0),
    ]


def test_upcycling_stops_between_two_layers() -> None:
    progress = UpcyclingProgress("bam", RecordingContext(stop_at=1, reports=[Progress(0, 10)]))
    progress(0, 10, "fitting routers")
    progress(1, 10, "fitting routers")
    with pytest.raises(Interrupted, match="upcycling bam is not finished"):
        progress(2, 10, "fitting routers")


def test_the_stage_reports_every_layer_that_it_fits(tmp_path: Path) -> None:
    fitted = {"method": "bam", "router": {"init": "means", "sequences": 8}}
    recipe = small_recipe(tmp_path, upcycle={"mixtures": {"bam": fitted}})
    store = open_store(recipe.store.uri)
    make_artifacts(recipe, store, ("corpora", "seeds", "branches"))
    context = RecordingContext()
    run_task(recipe, store, ArtifactKind.UPCYCLED, "bam", context)
    reported = [(report.step, report.total_steps) for report in context.reports if report.note == FITTED]
    assert reported[0][0] == 0
    assert [step for step, _ in reported] == list(range(reported[-1][1] + 1))
