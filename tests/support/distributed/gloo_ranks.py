"""A function that runs on several processes, which are the ranks of one gloo process group."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

TIMEOUT = 400.0  # seconds; ranks that hang fail their test and do not block the test run


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on the ranks 0 to `world_size` - 1 and return their results, in the order of ranks.

    `function` must be importable by name; it may return tensors, numbers and containers of them. An exception on one
    rank ends all ranks and is raised here with its traceback. The rendezvous store is hosted by the calling process, as
    the agent of torchrun does, so another process cannot take the port between its choice and its use.
    """
    # Imports take longer than everything else, so ranks are forked from a process that has made them already
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    multiprocessing.set_forkserver_preload([__name__, function.__module__, "bam_ray.on_deepspeed.engine"])
    store = dist.TCPStore(  # type: ignore[attr-defined]  # torch does not mark its re-exports
        "127.0.0.1", 0, world_size + 1, is_master=True, wait_for_workers=False
    )
    with tempfile.TemporaryDirectory() as folder:
        ranks = start_processes(
            _rank,
            (world_size, store.port, folder, function, arguments),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        end = time.monotonic() + TIMEOUT
        while not ranks.join(timeout=1.0):
            if time.monotonic() > end:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} on {world_size} ranks took more than {TIMEOUT} s")
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    result = function(*arguments)
    torch.save(result, Path(folder, f"{rank}.pt"))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
