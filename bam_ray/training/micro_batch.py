"""Find the micro batch that fits a device by trial, so that nobody has to guess it.

The global batch is a setting. The micro batch is the number of its sequences that pass through the model at once. It
only determines memory use and speed: the losses of a dense model are the same for every micro batch, except for
rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bam_ray.errors import TrainingError
from bam_ray.training.memory import Memory, is_out_of_memory
from bam_ray.units import GIB


def find_largest_micro_batch(
    trial: Callable[[int], None], limit: int, memory: Memory, any_rank: Callable[[bool], bool] = bool
) -> int:
    """Return the largest power of two up to `limit` for which `trial(size)` fits `memory`.

    Each size is measured before twice the size is tried. The memory for activations grows at most in proportion to
    the size, and a CPU raises no error when its memory ends: the kernel kills the process.

    Args:
        trial: Does a forward and backward pass over `size` sequences.
        limit: The largest size to try.
        memory: The memory of the device.
        any_rank: Returns True on all ranks if its argument is True on any rank, so that all ranks find the same size.

    Raises:
        TrainingError: If a single sequence does not fit.
    """
    if any_rank(runs_out_of_memory(trial, 1)):  # this trial also allocates what stays: gradients, library workspaces
        raise single_sequence_error(memory)
    base = memory.used_bytes()
    size = 1
    while True:
        memory.reset_peak()
        if any_rank(runs_out_of_memory(trial, size)):
            return max(1, size // 2)
        activations = max(0, memory.peak_bytes() - base)
        if 2 * size > limit or any_rank(2 * activations > memory.available_bytes()):
            return size
        size *= 2


def halve_until_it_fits(
    work: Callable[[int], None], size: int, memory: Memory, any_rank: Callable[[bool], bool] = bool
) -> int:
    """Do `work(size)`, and halve `size` each time memory runs out on any rank; returns the size that fits.

    `work` starts from the beginning each time. Raises `TrainingError` if a single sequence does not fit.
    """
    while any_rank(runs_out_of_memory(work, size)):
        if size == 1:
            raise single_sequence_error(memory)
        size //= 2
    return size


def runs_out_of_memory(work: Callable[[int], None], size: int) -> bool:
    """Do `work(size)` and return True if it ran out of memory; all other errors are raised.

    The error is dropped before this function returns, because its traceback keeps the tensors of the failed pass alive.
    """
    try:
        work(size)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return False
    torch.cuda.empty_cache()  # the failed pass leaves cached blocks of the wrong size
    return True


def single_sequence_error(memory: Memory) -> TrainingError:
    """Return the error for a device that cannot hold a step with a single sequence."""
    return TrainingError(
        f"out of memory with a micro batch of one sequence ({_used_and_free(memory)}): use a device with more memory "
        "or a smaller data.sequence_length"
    )


@contextmanager
def updating_weights(memory: Memory) -> Iterator[None]:
    """Raise `TrainingError` if memory runs out in the block, which updates the weights.

    It cannot be repeated with a smaller micro batch: some weights may be updated already, and its memory does not
    depend on the micro batch.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory in the update of the weights ({_used_and_free(memory)}): use devices with more memory, or "
            "more workers with zero_stage 2 or 3"
        ) from error


def _used_and_free(memory: Memory) -> str:
    return f"{memory.used_bytes() / GIB:.1f} GiB in use, {memory.available_bytes() / GIB:.1f} GiB free"
