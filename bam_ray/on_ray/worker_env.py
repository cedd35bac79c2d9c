"""The environment of a worker process: its node, its devices, its output, its threads and its log."""

import logging
import os
from collections import deque

import ray

from bam_ray.on_ray.cluster import living_nodes
from bam_ray.pipeline.states import Node

QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
ALLOCATOR_SETTINGS = {ALLOCATOR, "PYTORCH_ALLOC_CONF"}  # the second is the name since torch 2.9
LAUNCH_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"


def current_node() -> Node:
    """Return the node that this process runs on."""
    id = ray.get_runtime_context().get_node_id()
    return next(Node(node.id, node.name) for node in living_nodes() if node.id == id)


def device_environment(gpus: float) -> dict[str, str]:
    """Return the environment variables by which a worker computes on the devices that it requested.

    A worker that requested no GPU must see none, because other tasks use those of the node. Ray restricts only the
    workers that requested one. The variables have no effect once torch has asked CUDA for its devices.
    """
    if not gpus:
        return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    found = {"DS_ACCELERATOR": "cuda"}
    if not ALLOCATOR_SETTINGS & set(os.environ):
        # The experts' numbers of tokens change with every step, which fragments memory in blocks of fixed sizes
        found[ALLOCATOR] = "expandable_segments:True"
    # Attention and FFN exchange tokens at the same time, through two communicators of the same ranks, which could
    # deadlock if the order of their kernels was not the same on every GPU. NCCL knows the variable since 2.26
    found[LAUNCH_ORDER] = os.environ.get(LAUNCH_ORDER, "1")
    return found


def silence_libraries() -> None:
    """Turn off the progress bars and banners of libraries, because nobody reads a worker's output."""
    os.environ.update(QUIET_LIBRARIES)


def limit_threads(cpus: float) -> None:
    """Make torch use as many threads as CPUs were requested, because tasks share nodes."""
    import torch

    torch.set_num_threads(max(1, int(cpus)))


def keep_log(lines: deque[str]) -> None:
    """Append everything that this process logs to `lines`, to be shown with an error."""

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    keeper = Keeper()
    keeper.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(keeper)
    logging.getLogger("bam_ray").setLevel(logging.INFO)
