"""The micro batch that fits a device: found by trial, so that no person has to guess it.

The global batch is a setting; how many of its sequences go through the model at once only decides how much memory that
takes and how fast it is. Dense models give the same losses for any, but for rounding.
"""

from collections.abc import Callable

import torch

from bam_ray.errors import TrainingError
from bam_ray.training.memory import GIB, Memory, is_out_of_memory


def largest_that_fits(trial: Callable[[int], None], most: int, memory: Memory) -> int:
    """The largest power of two up to `most` for which `trial(size)`, a forward and backward pass, fits `memory`.

    Each size is measured before twice as much is tried: memory for activations grows at most in proportion, and a CPU's
    does not say no when it ends (the kernel kills the process). Raises `TrainingError` where one sequence is too much.
    """
    if ran_out(trial, 1):  # this one also leaves behind what stays: gradients, the libraries' workspaces
        raise too_small(memory)
    base = memory.used()
    size = 1
    while True:
        memory.reset_peak()
        if ran_out(trial, size):
            return max(1, size // 2)
        activations = max(0, memory.peak() - base)
        if 2 * size > most or 2 * activations > memory.room():
            return size
        size *= 2


def ran_out(work: Callable[[int], None], size: int) -> bool:
    """Whether `work(size)` ran out of memory; other errors are raised.

    The error is dropped before this returns: its traceback would keep the tensors of the failed pass alive.
    """
    try:
        work(size)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return False
    torch.cuda.empty_cache()  # what is left of the failed pass is in pieces of the wrong size
    return True


def too_small(memory: Memory) -> TrainingError:
    """The device cannot hold a step with a single sequence."""
    return TrainingError(
        f"out of memory with a micro batch of one sequence ({memory.used() / GIB:.1f} GiB in use, "
        f"{memory.room() / GIB:.1f} GiB free): use a device with more memory or a smaller data.sequence_length"
    )
