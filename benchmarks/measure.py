"""What all benchmarks share: fair timing, the machine in words, a table and a JSON file."""

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


def seconds(cases: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """The median seconds of each case, on torch's default device.

    One call of each case a round: what slows the machine down for a while slows all of them. On the CPU it is CPU time,
    on one thread, which says what the process computed and not what others did meanwhile; on a GPU it is the time until
    that has computed all.
    """
    torch.set_num_threads(1)
    on_gpu = torch.get_default_device().type == "cuda"

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
    """Each case's time over that of `floor`."""
    return {name: time / taken[floor] for name, time in taken.items()}


def hardware() -> dict[str, str]:
    """The machine and the libraries that were measured."""
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
        "load": f"{os.getloadavg()[0]:.1f}",  # of the minute before: what else the machine did
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
