"""Timing, hardware description and output that all benchmarks share."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def seconds(
    cases: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2, device: str | None = None
) -> dict[str, float]:
    """Return the median seconds of each case, which computes on `device` (None: torch's default device).

    Every round calls each case once, so a temporary slowdown of the machine affects all cases. On the CPU, the CPU time
    of one thread is measured, which does not depend on other processes. On a GPU, it is the time until all kernels have
    finished.
    """
    torch.set_num_threads(1)
    on_gpu = (device or torch.get_default_device().type) == "cuda"

    def now() -> float:
        if not on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    for run in cases.values():
        for _ in range(warm_up):
            run()
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            start = now()
            run()
            taken[name].append(now() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def ratios(taken: Mapping[str, float], floor: str) -> dict[str, float]:
    """Return the time of each case over that of `floor`."""
    return {name: time / taken[floor] for name, time in taken.items()}


def hardware() -> dict[str, str]:
    """Describe the machine and the libraries."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "accelerator": accelerator,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": f"{os.getloadavg()[0]:.1f}",  # of the last minute: the other work of the machine
    }


def report(name: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> Path:
    """Print the rows, write them to `results/NAME.json` with date and hardware, and return that path."""
    table = Table(*columns, title=name.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row))
    Console().print(table)
    facts: dict[str, Any] = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    return path
