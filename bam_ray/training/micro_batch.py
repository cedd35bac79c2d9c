"""The micro batch that fits a device: found by trial, so that no person has to guess it.

The global batch is a setting; how many of its sequences go through the model at once only decides how much memory that
takes and how fast it is. Dense models give the same losses for any, but for rounding.
"""

from collections.abc import Callable

import torch

from bam_ray.errors import TrainingError
from bam_ray.training.memory import GIB, Memory, is_out_of_memory


def largest_that_fits(
    trial: Callable[[int], None], most: int, memory: Memory, any_rank: Callable[[bool], bool] = bool
) -> int:
    """The largest power of two up to `most` for which `trial(size)`, a forward and backward pass, fits `memory`.

    Each size is measured before twice as much is tried: memory for activations grows at most in proportion, and a CPU's
    does not say no when it ends (the kernel kills the process). Processes that train together find the same by asking
    whether something holds for `any_rank`. Raises `TrainingError` where one sequence is too much.
    """
    if any_rank(ran_out(trial, 1)):  # this one also leaves behind what stays: gradients, the libraries' workspaces
        raise too_small(memory)
    base = memory.used()
    size = 1
    while True:
        memory.reset_peak()
        if any_rank(ran_out(trial, size)):
            return max(1, size // 2)
        activations = max(0, memory.peak() - base)
        if 2 * size > most or any_rank(2 * activations > memory.room()):
            return size
        size *= 2


def halved_to_fit(
    work: Callable[[int], None], size: int, memory: Memory, any_rank: Callable[[bool], bool] = bool
) -> int:
    """Do `work(size)`, with half the size as often as memory runs out on any rank; returns the size that did.

    Each time `work` begins anew. Raises `TrainingError` where one sequence is too much.
    """
    while any_rank(ran_out(work, size)):
        if size == 1:
            raise too_small(memory)
        size //= 2
    return size


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
