"""Checks for `benchmarks.on_gpu` that end in every way that a check can end."""

import os
import time

from benchmarks.gpu_worker import CheckFailed, Figures, NotOnThisDevice, Setup


def passes(setup: Setup) -> Figures:
    """Return a figure."""
    return {"on": setup.device}


def fails(setup: Setup) -> Figures:
    """Find something else than expected."""
    raise CheckFailed("2 is not 1\nmore about it")


def breaks(setup: Setup) -> Figures:
    """Raise an error that is no verdict."""
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def dies(setup: Setup) -> Figures:
    """End the process."""
    os._exit(3)


def hangs(setup: Setup) -> Figures:
    """Take too long."""
    time.sleep(60)
    return {}


def is_elsewhere(setup: Setup) -> Figures:
    """Need another device."""
    raise NotOnThisDevice("not on this device")
