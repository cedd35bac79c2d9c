"""The host memory that a checkpoint takes on each process of a group, over the size of the process's own part.

    python -m benchmarks.checkpoint_memory

Each case trains a small model for a step and writes a checkpoint to a folder, in fresh processes on CPUs. The result is
the peak of resident memory while the checkpoint is written and uploaded, above the resident memory before it. With room
for a copy, that is the copy. Without room, the part is written to a file while training waits.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.host_memory import TWO, TWO_WITH_EXPERTS, Case

TARGET = 1.2
CASES = (
    Case("dense, ZeRO-1", 512, 8, share=TWO),
    Case("dense, ZeRO-3", 512, 8, share=TWO, zero_stage=3),
    Case("4 experts, ZeRO-1", 320, 6, experts=4, share=TWO_WITH_EXPERTS),
    Case("4 experts, ZeRO-2", 320, 6, experts=4, share=TWO_WITH_EXPERTS, zero_stage=2),
)


def save(rank: int, case: Case, has_room: bool, port: int, folder: str) -> None:
    """Write a checkpoint as one of the processes of a case, and the memory that it took to `folder`."""
    from benchmarks import host_memory_rank

    host_memory_rank.save(rank, case, has_room, port, Path(folder))


def measure(case: Case, has_room: bool) -> list[tuple[int, int]]:
    """Return the additional peak and the size of the part of each process of a case, in bytes."""
    from torch.multiprocessing.spawn import start_processes

    from cluster.processes import free_ports

    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory(prefix="bam-benchmark-") as folder:
        arguments = (case, has_room, free_ports(1)[0], folder)
        start_processes(save, arguments, nprocs=case.share.workers, start_method="spawn")
        return [tuple(json.loads(path.read_text())) for path in sorted(Path(folder).glob("taken-*"))]


def main() -> None:
    """Measure, print a table and write `benchmarks/results/checkpoint_memory.json`."""
    from bam_ray.units import MIB
    from benchmarks.measure import report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="run the cases whose name contains this text")
    options = parser.parse_args()
    rows: list[list[Any]] = []
    for case in CASES:
        for has_room in (True, False) if options.case in case.name else ():
            taken = measure(case, has_room)
            peak, part = max(taken, key=lambda each: each[0] / each[1])
            whole = sum(size for _, size in taken)
            room = "copied" if has_room else "written at once"
            rows.append([case.name, room, whole / MIB, part / MIB, peak / MIB, peak / part])
    report("checkpoint_memory", ("case", "part", "whole MiB", "part MiB", "peak MiB", "peak / part"), rows)


if __name__ == "__main__":
    main()
