"""Run a function on several processes that are the ranks of one gloo group."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

DEADLINE = 400.0  # seconds; a hang is a failure, not the end of the test run


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on ranks 0 to world_size - 1 -> what each returned (tensors, numbers, containers).

    An exception on one rank ends all of them and is raised here with its traceback. The rendezvous store lives in this
    process, as torchrun's does, so no port can be lost between finding it free and using it.
    """
    # Ranks are forked from a process that has only imported what they need: imports take longer than all the rest.
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    multiprocessing.set_forkserver_preload([__name__, function.__module__, "bam_ray.on_deepspeed.engine"])
    store = dist.TCPStore("127.0.0.1", 0, world_size + 1, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            _rank,
            (world_size, store.port, folder, function, arguments),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        end = time.monotonic() + DEADLINE
        while not ranks.join(timeout=1.0):
            if time.monotonic() > end:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} on {world_size} ranks took over {DEADLINE} s")
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
