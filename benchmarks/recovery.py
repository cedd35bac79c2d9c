"""How long a branch stands still when its node is lost: kill -9 of a raylet, until the branch trains again elsewhere.

    python -m benchmarks.recovery

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
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bam_ray.control import status
from tests.support.faults.branch_checks import AttemptLog, attempts, check_branches
from tests.support.faults.cluster_under_test import ClusterUnderTest
from tests.support.faults.nodes import wait_for
from tests.support.faults.reference_run import ReferenceRun

TARGET = 15.0  # seconds
DOMAIN = "code"
RESULTS = Path(__file__).parent / "results"
PHASES = ("node given up", "next attempt begun", "trains again")


def main() -> None:
    """Measure, print a table and write `benchmarks/results/recovery.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bam-benchmark-") as folder:
        home = Path(folder)
        os.environ |= {"BAM_CACHE": str(home / "cache" / "reference"), "RAY_AUTH_MODE": "disabled"}
        reference = ReferenceRun(home / "reference", (DOMAIN,), steps=200 * (options.kills + 1))
        load = os.getloadavg()[0]
        with ClusterUnderTest(home) as cluster:
            times = measure(cluster, reference, options.kills)
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


def measure(cluster: ClusterUnderTest, reference: ReferenceRun, kills: int) -> list[dict[str, float]]:
    """Seconds from each kill to each phase; the branch must come to what an undisturbed one does."""
    store = cluster.store("recovery")
    reference.copy_seed_to(store)
    recipe = reference.recipe(cluster.uri("recovery"), cluster.proxy.endpoint)
    driver = cluster.submit(recipe)

    def log(attempt: int, ready: Callable[[AttemptLog], object]) -> AttemptLog:
        def found() -> AttemptLog | None:
            logs = attempts(store, recipe, DOMAIN)
            return logs[attempt - 1] if len(logs) >= attempt and ready(logs[attempt - 1]) else None

        found_log: AttemptLog = wait_for(f"attempt {attempt}", found)
        return found_log

    times = []
    for kill in range(1, kills + 1):
        log(kill, lambda log: len(log.checkpoints) >= 2)
        now = status.read(store)
        assert now is not None
        name = next(row.node for row in now.rows if row.kind == "branches")
        assert name is not None
        node = cluster.nodes[name]
        began = time.monotonic()
        node.kill_raylet()
        taken = {}
        waits: tuple[Callable[[], object], ...] = (
            partial(wait_for, "the node is given up", partial(given_up, cluster, node.id)),
            partial(log, kill + 1, lambda _: True),
            partial(log, kill + 1, lambda log: log.named("resumed")),
        )
        for phase, wait in zip(PHASES, waits, strict=True):
            wait()
            taken[phase] = round(time.monotonic() - began, 2)
        times.append(taken)
        cluster.restore()
    assert driver.join() == 0, driver.output
    check_branches(store, recipe, reference.expected)
    return times


def given_up(cluster: ClusterUnderTest, node_id: str) -> bool:
    """Return True if Ray's head no longer lists the node as alive."""
    return node_id not in cluster.living()


if __name__ == "__main__":
    main()
