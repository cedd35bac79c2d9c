"""The process groups of DeepSpeed, which all get the timeout of the world's group.

DeepSpeed 0.19.8 makes its groups (a clone of the world, groups of experts) without a timeout, and torch then uses a
default of its own, which is shorter on NCCL. There is no setting for it.
"""

from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.comm.torch import TorchBackend
from torch.distributed import ProcessGroup

from bam_ray.training.devices import COLLECTIVE_TIMEOUT


class TimeoutBackend(TorchBackend):
    """DeepSpeed's interface to torch.distributed, whose new groups have `COLLECTIVE_TIMEOUT`."""

    def new_group(self, ranks: Any) -> ProcessGroup | None:
        """Make a group of `ranks`."""
        group: ProcessGroup | None = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)
        return group


def join_process_group(backend: str) -> None:
    """Make the world's group from the environment unless it exists, and let DeepSpeed use `TimeoutBackend`."""
    if not isinstance(deepspeed.comm.comm.cdb, TimeoutBackend):
        deepspeed.comm.comm.cdb = TimeoutBackend(backend, COLLECTIVE_TIMEOUT, None)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
