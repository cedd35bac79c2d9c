"""The time from the loss of a node (kill -9 of its raylet) until its branch trains again on another node.

    python -m benchmarks.recovery

The cluster is real: a head and three nodes on this machine. Its health checks have the settings of the tests, which
notice a lost node within three to four seconds. Ray's default settings take longer, but cause no false alarms. Three
times are measured from the kill on:

node given up        Ray's head no longer lists the node as alive
next attempt begun   another attempt has the branch's lease; this includes the start of a process and its imports
trains again         that attempt has loaded its checkpoint and begins its next step
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
    """Return the seconds from each kill to each phase; asserts that the branch is as in a run without faults."""
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
