"""How long a branch stands still when its node is lost: kill -9 of a raylet, until the branch trains again elsewhere.

    PYTHONPATH=tests python -m benchmarks.recovery

On a real cluster of a head and three nodes of this machine, with health checks as its tests have them (a lost node is
noticed within three to four seconds; Ray's own settings take longer, but raise no false alarms). Three times are taken:
until Ray's head has given up the node, until another attempt has taken the branch's lease, which includes a new process
and its imports, and until it has taken up its checkpoint and begins its next step.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from faults.checking import Log, attempts, check_branches
from faults.tale import Tale
from faults.world import World, wait_for
from rich.console import Console
from rich.table import Table

from bam_ray.control import status

TARGET = 15.0  # seconds
DOMAIN = "code"
RESULTS = Path(__file__).parent / "results"
PHASES = ("node given up", "next attempt begun", "trains again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bam-benchmark-") as folder:
        home = Path(folder)
        os.environ |= {"BAM_CACHE": str(home / "cache" / "reference"), "RAY_AUTH_MODE": "disabled"}
        tale = Tale(home / "tale", (DOMAIN,), steps=200 * (options.kills + 1))
        load = os.getloadavg()[0]
        with World(home) as world:
            times = measure(world, tale, options.kills)
    table = Table(title=f"kill -9 of a raylet, {options.kills} times: seconds since; target ≤ {TARGET:.0f} s")
    for heading in ("until", "median", "most"):
        table.add_column(heading, justify="left" if heading == "until" else "right")
    for phase in PHASES:
        taken = [row[phase] for row in times]
        table.add_row(phase, f"{statistics.median(taken):.1f}", f"{max(taken):.1f}")
    Console().print(table)
    result = {
        "benchmark": "recovery",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "load_at_start": load,
            "torch": torch.__version__,
        },
        "options": vars(options),
        "target_seconds": TARGET,
        "kills": times,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "recovery.json").write_text(json.dumps(result, indent=1) + "\n")


def measure(world: World, tale: Tale, kills: int) -> list[dict[str, float]]:
    """Seconds from each kill to each phase; the branch must come to what an undisturbed one does."""
    store = world.store("recovery")
    tale.begin(store)
    recipe = tale.recipe(world.uri("recovery"), world.proxy.endpoint)
    run = world.submit(recipe)

    def log(attempt: int, ready: Callable[[Log], object]) -> Log:
        def found() -> Log | None:
            logs = attempts(store, recipe, DOMAIN)
            return logs[attempt - 1] if len(logs) >= attempt and ready(logs[attempt - 1]) else None

        found_log: Log = wait_for(f"attempt {attempt}", found)
        return found_log

    times = []
    for kill in range(1, kills + 1):
        log(kill, lambda log: len(log.checkpoints) >= 2)
        now = status.read(store)
        assert now is not None
        name = next(row.node for row in now.rows if row.kind == "branches")
        assert name is not None
        node = world.nodes[name]
        began = time.monotonic()
        node.kill_raylet()
        taken = {}
        for phase, reached in zip(
            PHASES,
            (
                lambda lost=node.id: wait_for("given up", lambda: lost not in world.living()),
                lambda number=kill + 1: log(number, lambda _: True),
                lambda number=kill + 1: log(number, lambda log: log.named("resumed")),
            ),
            strict=True,
        ):
            reached()
            taken[phase] = round(time.monotonic() - began, 2)
        times.append(taken)
        world.mend()
    assert run.join() == 0, run.said
    check_branches(store, recipe, tale.unbroken)
    return times


if __name__ == "__main__":
    main()
