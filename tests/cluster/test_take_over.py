"""`--take-over` reaches the driver, and the driver says when it waits for another one. No cluster is needed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.leases import AttemptNumber, Lease
from bam_ray.control.controller import Controller
from bam_ray.control.drivers import DriverRegistry
from bam_ray.errors import StoreUnavailable
from bam_ray.on_ray import job, submit
from bam_ray.on_ray.run import PacedReport, StatusReporter
from tests.support.command_line import bam
from tests.support.control.scripted_launcher import ScriptedLauncher, make_task

ROOT = Path(__file__).parents[2]


class JobServer:
    """A job server that records what is submitted, and refuses it."""

    def __init__(self) -> None:
        self.entrypoints: list[str] = []

    def submit_job(self, entrypoint: str, **_: Any) -> str:
        self.entrypoints.append(entrypoint)
        raise RuntimeError("no more jobs")


@pytest.mark.parametrize(
    ("command", "script"),
    [("run", "run_all.py"), ("evaluate", "evaluate.py"), ("compare", "compare.py"), ("serve", "serve.py")],
)
def test_the_commands_pass_it_to_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, script: str
) -> None:
    server = JobServer()
    monkeypatch.setattr(submit, "client", lambda address: server)
    monkeypatch.chdir(ROOT)
    assert bam(monkeypatch, command, "recipes/demo.yaml", "--take-over", "store.uri=/nowhere") == 1
    assert bam(monkeypatch, command, "recipes/demo.yaml", "store.uri=/nowhere") == 1
    start = f"python jobs/{script} --recipe recipes/demo.yaml"
    assert [entry.removeprefix(start).split()[0] for entry in server.entrypoints] == [
        "--take-over",
        "store.uri=/nowhere",
    ]
    assert "no more jobs" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--take-over"]])
def test_a_job_passes_it_to_the_driver(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    seen = []

    def run_tasks(recipe: object, kinds: object, factory: object, take_over: bool) -> str:
        seen.append(take_over)
        return "finished"

    monkeypatch.setattr(job, "run_tasks", run_tasks)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--recipe", str(ROOT / "recipes/demo.yaml"), *flags, "name=demo"])
    with pytest.raises(SystemExit, match="0"):
        job.run_job(None)
    assert seen == [bool(flags)]


def test_the_driver_prints_whom_it_waits_for_once(capsys: pytest.CaptureFixture[str]) -> None:
    store = MemoryStore()
    other = DriverRegistry(store, "another run")
    for name in ("a", "b"):
        Lease.take(store, f"branches/{name}", AttemptNumber(other.epoch, 1))
    registry = DriverRegistry(store, "demo")
    controller = Controller([make_task("a"), make_task("b")], store, ScriptedLauncher(), drivers=registry)
    report = StatusReporter("demo", controller, store)
    for _ in range(3):
        report(controller.step())
    lines = [line for line in capsys.readouterr().out.splitlines() if "waiting for it" in line]
    (line,) = lines
    assert line.startswith("branches/a is made by the driver of another run on ")
    assert line.endswith(": waiting for it; if that driver is gone, submit with --take-over")


class FailingStore(MemoryStore):
    """A store that can be unavailable."""

    fails = False

    def list(self, prefix: str = "") -> Any:
        if self.fails:
            raise StoreUnavailable("503 of [the] server")
        return super().list(prefix)


def test_the_driver_prints_that_the_store_fails(capsys: pytest.CaptureFixture[str]) -> None:
    store = FailingStore()
    now = [0.0]
    controller = Controller(
        [make_task("a")],
        store,
        ScriptedLauncher(),
        clock=lambda: now[0],
        drivers=DriverRegistry(store, "demo", clock=lambda: now[0]),
    )
    report = StatusReporter("demo", controller, store)
    for store.fails in (False, True, True, False, False):
        now[0] += 10.0
        report(controller.step())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the store")]
    assert lines == ["the store fails, and is asked again: 503 of [the] server", "the store answers again"]


def test_reports_take_a_small_share_of_the_time() -> None:
    now, made = [0.0], [0]

    def slow(seconds: float) -> Callable[[], None]:
        def make() -> None:
            made[0] += 1
            now[0] += seconds

        return make

    def count(seconds: float, changed: bool) -> int:
        now[0], made[0] = 0.0, 0
        report = PacedReport(slow(seconds), 2.0, lambda: now[0])
        while now[0] < 100.0:
            report.make_if_due(changed)
            now[0] += 0.5
        return made[0]

    assert count(0.0, changed=False) == 50
    assert count(0.0, changed=True) == 200
    assert count(1.0, changed=True) == count(1.0, changed=False) == 5
