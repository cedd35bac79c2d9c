"""All checks of a machine with one GPU, in the order of their value, in at most eight minutes.

    python -m benchmarks.on_gpu [--out FILE] [--only NAME,NAME]
    python -m benchmarks.on_gpu --device cpu --tiny
    python -m benchmarks.on_gpu --list-wheels

The checks run in a process of their own, so that an error of CUDA or a hang ends only the check that has it: the next
one gets a new process. Each check prints PASS or FAIL, or what it measured, as soon as it ends. The last line is a JSON
document, which `--out` writes to a file too. The exit code is 1 if a check failed.

Ray is not needed. A machine that has PyTorch for CUDA and the usual packages beside it needs only the packages that
`--list-wheels` prints.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu_worker import Check, CheckFailed, Setup, Worker, one_line

BUDGET = 480.0  # seconds, with the start of the processes
START_SECONDS = 150.0  # a cold disk reads the libraries for a minute
WHEELS = (
    "transformers",
    "tokenizers",
    "huggingface-hub",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "typing-extensions",
    "deepspeed",
    "hjson",
    "tenacity",
    "fastapi",
    "starlette",
    "opentelemetry-api",
)
"""The packages that images with PyTorch often lack, or have in an older version."""
VERSIONS = ("torch", "triton", "transformers", "deepspeed", "numpy")

CORRECTNESS, SPEED = "benchmarks.gpu_checks", "benchmarks.gpu_speed"
CHECKS = (
    Check("parity", CORRECTNESS, 90),
    Check("deepspeed_engine", CORRECTNESS, 75),
    Check("out_of_memory", CORRECTNESS, 60),
    Check("training_step", SPEED, 75, judges=False),
    Check("step_sizes", SPEED, 60, judges=False),
    Check("kernels", SPEED, 45, judges=False),
    Check("planned_memory", CORRECTNESS, 45),
    Check("evaluation", CORRECTNESS, 40),
    Check("serving", CORRECTNESS, 60),
    Check("decoding_speed", SPEED, 60, judges=False),
    Check("checkpoint", CORRECTNESS, 60),
    Check("loss", SPEED, 60, judges=False),
    Check("mixture_blocks", SPEED, 45, judges=False),
    Check("ffn_experts", SPEED, 45, judges=False),
)


@dataclass(frozen=True)
class Outcome:
    """The end of a check."""

    name: str
    outcome: str  # PASS, FAIL, MEASURED or SKIPPED
    seconds: float
    why: str = ""  # one line, of FAIL and SKIPPED
    figures: Mapping[str, float | str] | None = None

    def __str__(self) -> str:
        lines = [f"{self.outcome:8} {self.name} ({self.seconds:.0f} s){': ' if self.why else ''}{self.why}"]
        for name, figure in (self.figures or {}).items():
            lines.append(
                f"         {name}: {figure:.4g}" if isinstance(figure, float) else f"         {name}: {figure}"
            )
        return "\n".join(lines)


class Session:
    """The checks of one run, their budget, and the process that they run in."""

    def __init__(self, setup: Setup, budget: float) -> None:
        self.setup, self._end = setup, time.monotonic() + budget
        self.date = datetime.now(UTC).isoformat(timespec="seconds")
        self._worker: Worker | None = None
        self.hardware: dict[str, str] = {}

    def run(self, check: Check) -> Outcome:
        """Run a check unless the budget is spent."""
        started = time.monotonic()
        if started >= self._end:
            return Outcome(check.name, "SKIPPED", 0.0, "the time is spent")
        try:
            worker = self._started_worker()
            worker.send(check)
            name, why, figures = worker.receive(min(check.seconds, self._end - time.monotonic()))
        except (CheckFailed, BrokenPipeError) as failure:
            name, why, figures = "FAIL", one_line(failure), {}
        if name == "FAIL":
            self.stop()  # an error of CUDA stays with its process, and so may memory
        return Outcome(check.name, name, time.monotonic() - started, why, figures)

    def _started_worker(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self.setup)
            found = self._worker.receive(min(START_SECONDS, self._end - time.monotonic()))
            if isinstance(found, str):
                sys.exit(found)
            self.hardware = found
        return self._worker

    def stop(self) -> None:
        """End the process of the checks, if there is one."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


def document(session: Session, outcomes: list[Outcome]) -> str:
    """Return the results as one line of JSON."""
    facts = {
        "benchmark": "on_gpu",
        "date": session.date,
        **asdict(session.setup),
        "hardware": session.hardware,
        "versions": {name: installed(name) for name in VERSIONS},
        "checks": [asdict(each) for each in outcomes],
    }
    return json.dumps(facts)


def installed(package: str) -> str:
    """Return the installed version of a package, or an empty text if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main() -> None:
    """Run the checks, print and write their outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [check.name for check in CHECKS]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models that a CPU computes in seconds")
    parser.add_argument("--only", default=",".join(names), help="names of checks, with commas between them")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds; a check never starts after them")
    parser.add_argument("--out", type=Path, help="file for the JSON document")
    parser.add_argument("--list-wheels", action="store_true", help="print the packages to bring, and exit")
    options = parser.parse_args()
    if options.list_wheels:
        print("\n".join(f"{name}=={installed(name)}" if installed(name) else name for name in WHEELS))
        return
    chosen = options.only.split(",")
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"there is no check {unknown[0]}: use some of {', '.join(names)}")
    session = Session(Setup(options.device, options.tiny), options.budget)
    outcomes: list[Outcome] = []
    try:
        for check in CHECKS:
            if check.name not in chosen:
                continue
            outcomes.append(session.run(check))
            print(outcomes[-1], flush=True)
            if options.out is not None:  # after each check, so that nothing is lost if the machine is
                options.out.write_text(document(session, outcomes) + "\n")
    finally:
        session.stop()
    print(document(session, outcomes))
    sys.exit(int(any(each.outcome == "FAIL" for each in outcomes)))


if __name__ == "__main__":
    main()
