"""The checks for a machine with a GPU, run on the CPU so that they stay runnable."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_worker import Check, Setup
from benchmarks.on_gpu import CHECKS, WHEELS, Session

ROOT = Path(__file__).parents[2]
ABSENT = ("ray", "datasets", "pyarrow", "boto3", "botocore", "tensorboard", "matplotlib", "peft", "sklearn", "uvicorn")
"""Libraries of this project that a machine with PyTorch alone may not have."""


def run(*arguments: str, folder: Path, absent: tuple[str, ...] = ABSENT) -> subprocess.CompletedProcess[str]:
    """Run the script in a process whose own processes find none of the absent libraries."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in absent)
    (folder / "sitecustomize.py").write_text(f"import sys\n{blocked}")
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.on_gpu", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=570,
    )


@pytest.mark.slow
def test_all_checks_pass_on_the_cpu_without_ray(tmp_path: Path) -> None:
    out = tmp_path / "checks.json"
    done = run("--device", "cpu", "--tiny", "--out", str(out), folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(out.read_text())
    assert facts == json.loads(done.stdout.splitlines()[-1])
    ended = {check["name"]: check["outcome"] for check in facts["checks"]}
    assert ended.pop("out_of_memory") == "SKIPPED"
    assert ended == {check.name: "PASS" if check.judges else "MEASURED" for check in CHECKS if check.name in ended}
    assert len(ended) == len(CHECKS) - 1
    assert facts["hardware"]["accelerator"] == "none"


@pytest.mark.slow
def test_no_end_of_a_check_ends_the_others() -> None:
    names = ("fails", "breaks", "passes", "dies", "hangs", "is_elsewhere", "passes")
    session = Session(Setup("cpu", tiny=True), 300.0)
    try:
        ended = [
            session.run(Check(name, "tests.support.gpu_checks", 1.0 if name == "hangs" else 60.0)) for name in names
        ]
    finally:
        session.stop()
    assert [(each.outcome, each.why) for each in ended] == [
        ("FAIL", "2 is not 1"),
        ("FAIL", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("PASS", ""),
        ("FAIL", "the process ended with code 3"),
        ("FAIL", "no answer within 1 s"),
        ("SKIPPED", "not on this device"),
        ("PASS", ""),
    ]
    assert ended[-1].figures == {"on": "cpu"}


def test_no_check_starts_or_ends_after_the_budget(tmp_path: Path) -> None:
    names = "training_step,evaluation"
    done = run("--device", "cpu", "--tiny", "--only", names, "--budget", "0.5", folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    failed, skipped, _ = done.stdout.splitlines()
    assert failed.startswith("FAIL     training_step") and "no answer within" in failed
    assert skipped.startswith("SKIPPED  evaluation") and skipped.endswith("the time is spent")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    done = run(folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("torch finds no GPU: use --device cpu --tiny")


@pytest.mark.slow
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--tiny", folder=tmp_path, absent=("pydantic",))
    assert done.returncode == 1
    assert "pydantic" in done.stderr.splitlines()[-1]
    assert done.stderr.endswith(": install the packages that --list-wheels prints\n")


def test_the_wheels_to_bring_have_versions(tmp_path: Path) -> None:
    lines = run("--list-wheels", folder=tmp_path).stdout.splitlines()
    assert [line.partition("==")[0] for line in lines] == list(WHEELS)
    assert all("==" in line for line in lines)
