"""How much memory a training process holds and may still take, on a CPU or a GPU, and what running out looks like."""

import contextlib
import os
from pathlib import Path
from typing import Protocol

import psutil
import torch

GIB = 1 << 30
MARGIN = 0.9  # of what is free: allocators fragment, and what was measured is not all that will ever be needed
CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # version 2, version 1
CGROUP_USAGES = ("memory.current", "memory/memory.usage_in_bytes")
CGROUP = Path("/sys/fs/cgroup")


class Memory(Protocol):
    """The memory that a model is trained in. All numbers are bytes."""

    def used(self) -> int:
        """What this process holds now."""
        ...

    def peak(self) -> int:
        """The most it held since `reset_peak`."""
        ...

    def reset_peak(self) -> None:
        """Forget the peak."""
        ...

    def room(self) -> int:
        """What it may safely take beyond `used`."""
        ...


class DeviceMemory:
    """A GPU's, as torch's allocator sees it."""

    def __init__(self, device: str) -> None:
        self._device = device

    def used(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def room(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int((free + cached) * MARGIN)


class HostMemory:
    """The machine's: up to `limit` bytes for this process where a task asked for that much.

    A task that did not say what it needs gets its share of what is free: by the threads it computes with, for other
    tasks on the node do the same. A container's limit counts as the machine's memory.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._process = psutil.Process()

    def used(self) -> int:
        return int(self._process.memory_info().rss)

    def peak(self) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return self.used()

    def reset_peak(self) -> None:
        with contextlib.suppress(OSError):  # not allowed everywhere; the peak is too high then, which is safe
            Path("/proc/self/clear_refs").write_text("5")

    def room(self) -> int:
        free = min(psutil.virtual_memory().available, *cgroup_room())
        if self._limit is not None:
            return int(min(free, max(0, self._limit - self.used())) * MARGIN)
        return int(free * MARGIN * min(1.0, torch.get_num_threads() / (os.cpu_count() or 1)))


def cgroup_room(folder: Path = CGROUP) -> list[int]:
    """What the limits of the container that this runs in leave free; empty where there is none."""
    found = []
    for limit, usage in zip(CGROUP_LIMITS, CGROUP_USAGES, strict=True):
        with contextlib.suppress(OSError, ValueError):  # no such version here, or the limit is "max"
            found.append(max(0, int((folder / limit).read_text()) - int((folder / usage).read_text())))
    return found


def memory_of(device: str, limit_gib: float = 0.0) -> Memory:
    """The memory of `device`; `limit_gib` (0: none) is what the task asked for on the host."""
    return DeviceMemory(device) if device.startswith("cuda") else HostMemory(int(limit_gib * GIB) or None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is how torch or Python says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in said or "ALLOC_FAILED" in said)
