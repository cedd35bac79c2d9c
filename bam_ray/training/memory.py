"""The memory that a training process holds and can still take, on a CPU or a GPU."""

import contextlib
import ctypes
import errno
import os
import re
from pathlib import Path
from typing import Protocol

import psutil
import torch

from bam_ray.units import GIB

USABLE_FRACTION = 0.9  # of the free memory: allocators fragment, and a measurement does not cover every later need
CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # version 2, version 1
CGROUP_USAGES = ("memory.current", "memory/memory.usage_in_bytes")
CGROUP = Path("/sys/fs/cgroup")
OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|cannot allocate memory|not enough memory|alloc_failed|failed to allocate",
    re.IGNORECASE,
)
"""Matches the errors of CUDA and NCCL outside torch's allocator, of the CPU allocator, cuBLAS and cuDNN."""


class Memory(Protocol):
    """The memory that a model is trained in. All numbers are bytes."""

    def used_bytes(self) -> int:
        """Return the number of bytes that this process holds now."""
        ...

    def peak_bytes(self) -> int:
        """Return the most that this process held since the last `reset_peak`."""
        ...

    def reset_peak(self) -> None:
        """Start to measure a new peak."""
        ...

    def available_bytes(self) -> int:
        """Return the number of bytes that this process can safely take in addition to `used_bytes`."""
        ...


class DeviceMemory:
    """The memory of a GPU, as torch's allocator sees it."""

    def __init__(self, device: str) -> None:
        self._device = device

    def used_bytes(self) -> int:
        """See `Memory`."""
        return torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        """See `Memory`."""
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        """See `Memory`."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def available_bytes(self) -> int:
        """See `Memory`."""
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int((free + cached) * USABLE_FRACTION)


class HostMemory:
    """The memory of the machine, up to `limit` bytes for this process if the task requested an amount.

    A task that requested no amount gets a share of the free memory in proportion to its compute threads, because other
    tasks on the node do the same. The limit of a container counts as the memory of the machine.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._process = psutil.Process()

    def used_bytes(self) -> int:
        """See `Memory`."""
        return int(self._process.memory_info().rss)

    def peak_bytes(self) -> int:
        """See `Memory`."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return self.used_bytes()

    def reset_peak(self) -> None:
        """See `Memory`."""
        with contextlib.suppress(OSError):  # not allowed everywhere: the peak is then too high, which is safe
            Path("/proc/self/clear_refs").write_text("5")

    def available_bytes(self) -> int:
        """See `Memory`."""
        return_freed_memory()
        free = min(psutil.virtual_memory().available, *cgroup_available_bytes())
        if self._limit is not None:
            return int(min(free, max(0, self._limit - self.used_bytes())) * USABLE_FRACTION)
        return int(free * USABLE_FRACTION * min(1.0, torch.get_num_threads() / (os.cpu_count() or 1)))


def return_freed_memory() -> None:
    """Return the memory that malloc keeps after it was freed to the machine, so that it does not count as used."""
    with contextlib.suppress(AttributeError, OSError):  # not in every C library
        ctypes.CDLL(None).malloc_trim(0)


def cgroup_available_bytes(folder: Path = CGROUP) -> list[int]:
    """Return the bytes that the limits of this process's container leave free; empty if there is no limit."""
    found = []
    for limit, usage in zip(CGROUP_LIMITS, CGROUP_USAGES, strict=True):
        with contextlib.suppress(OSError, ValueError):  # this version is not in use, or the limit is "max"
            found.append(max(0, int((folder / limit).read_text()) - int((folder / usage).read_text())))
    return found


def memory_of(device: str, host_limit: int | None = None) -> Memory:
    """Return the memory of `device`. On a CPU the process may use at most `host_limit` bytes (None: no limit)."""
    return DeviceMemory(device) if device.startswith("cuda") else HostMemory(host_limit)


def limit_in_bytes(memory_gib: float | None) -> int | None:
    """Return a task's memory request in bytes, or None if the task requested no amount (None or 0)."""
    return int(memory_gib * GIB) if memory_gib else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if torch or Python raised `error` because memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
