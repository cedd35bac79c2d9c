"""The memory of this machine, and the part of it that each node of the local cluster offers to tasks."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import psutil

from bam_ray.units import GIB, MIB

CGROUPS = {  # limit and usage of this container, version 2 and version 1
    "memory.max": "memory.current",
    "memory/memory.limit_in_bytes": "memory/memory.usage_in_bytes",
}
CGROUP = Path("/sys/fs/cgroup")
OWN_BYTES = 5 * GIB // 2  # of Ray's processes, the S3 server, the driver of a run, and Ray Train
LEAST_BYTES = GIB  # offered even if the machine has less: a task then waits for nothing that can come
HEAD_BYTES = 256 * MIB  # offered by the head, which runs the driver


def available_memory(folder: Path = CGROUP) -> int:
    """Return the bytes of memory that are free on this machine and in this container."""
    free = [int(psutil.virtual_memory().available)]
    for limit, usage in CGROUPS.items():
        with contextlib.suppress(OSError, ValueError):  # this version is not in use, or the limit is "max"
            free.append(int((folder / limit).read_text()) - int((folder / usage).read_text()))
    return max(0, min(free))


def memory_of_nodes(available: int, cpus: Mapping[str, int]) -> dict[str, int]:
    """Return the memory that each worker node offers, in proportion to its CPUs.

    Every node of the local cluster sees the memory of the whole machine, and would offer all of it.

    Args:
        available: The free memory of the machine before the cluster starts.
        cpus: The CPUs of the worker nodes by name.
    """
    offered = max(LEAST_BYTES, available - OWN_BYTES - HEAD_BYTES)
    return {name: offered * count // sum(cpus.values()) for name, count in cpus.items()}
