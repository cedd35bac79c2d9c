"""Return of freed memory to the system while large buffers come and go in several threads.

glibc keeps freed buffers of up to 32 MiB once a process has freed one of that size, in a heap for each thread. Reading
and writing tensors would then hold about twice the memory that is in use.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
RETURNED_BYTES = 1 << 20  # buffers from this size on are returned
KEPT_BYTES = 32 << 20  # the size up to which glibc keeps buffers after a while


@contextmanager
def large_buffers_returned() -> Iterator[None]:
    """Let glibc return every freed buffer of 1 MiB or more to the system. Other C libraries are left unchanged."""
    _keep_up_to(RETURNED_BYTES)
    try:
        yield
    finally:
        _keep_up_to(KEPT_BYTES)


def _keep_up_to(size: int) -> None:
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(MMAP_THRESHOLD, size)
