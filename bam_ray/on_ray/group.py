"""The process group of one task under Ray Train: a mixture, or a seed or branch with several workers.

Ray Train places the ranks, joins them into a torch process group, and stops all of them when one is lost. Nothing else
of Ray Train is used. Checkpoints go to the blob store like those of all tasks, and the controller decides about
retries, so that one policy and one table cover all tasks. `run_group` blocks; it runs on the thread of a `TaskActor`.
"""

import os
import re
import tempfile
import threading
import time
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from bam_ray.errors import BamError, Interrupted, TrainingError, one_line
from bam_ray.on_ray.deaths import with_memory_cause
from bam_ray.on_ray.work import Work
from bam_ray.on_ray.worker_env import current_node, device_environment, limit_threads, silence_libraries
from bam_ray.pipeline.tasks import Progress
from bam_ray.scheduling.nodes import ray_resources
from bam_ray.training.devices import COLLECTIVE_TIMEOUT

EXCHANGE_SECONDS = 1.0  # time between two exchanges of rank 0 with the driver
PEER_LOST = re.compile(
    "connection (closed|reset) by peer|broken pipe|timed out waiting|application timeout caused pair closure|"
    "remote process exited or there was a network error",
    re.IGNORECASE,
)
"""Matches the error of a collective whose peer went away: the messages of gloo, and the last one of NCCL."""


def run_group(work: Work, host: Any) -> None:
    """Run a training task on `work.task.workers` processes that report to `host`, their `TaskActor`.

    Returns when all ranks have returned, and raises the error that ended the process group.
    """
    # Ray Train would change the working directory of the ranks, so that relative paths of a recipe would not resolve
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"

    def train() -> None:
        train_on_rank(work, host)

    needs = work.task.needs
    with tempfile.TemporaryDirectory(prefix="bam-train-") as folder:  # Ray Train's own files, not needed afterwards
        trainer = TorchTrainer(
            train,
            torch_config=TorchConfig(
                backend="nccl" if needs.gpus else "gloo", timeout_s=int(COLLECTIVE_TIMEOUT.total_seconds())
            ),
            scaling_config=ScalingConfig(
                num_workers=work.task.workers,
                use_gpu=needs.gpus > 0,
                resources_per_worker=ray_resources(needs),
                label_selector=work.selector or None,
            ),
            run_config=RunConfig(
                name=work.task.id,
                storage_path=folder,
                # From the start of the process, because Ray Train asks CUDA for its devices before it calls `train`
                worker_runtime_env={"env_vars": device_environment(needs.gpus)},
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise with_memory_cause(root_cause(error), work.task) from error


def train_on_rank(work: Work, host: Any) -> None:
    """Run one rank's part of the task; rank 0 reports progress to `host`."""
    silence_libraries()
    limit_threads(work.task.needs.cpus)
    context = RankContext(host)
    try:
        work.execute_rank(context, context.rank)
    except Interrupted:
        # Ray Train ends the group when the first rank fails. So no rank fails here, and no rank returns early, because
        # rank 0 may still be writing the checkpoint.
        context.wait_for_rank_0()
    finally:
        context.close()


class RankContext:
    """The `StageContext` of one rank.

    Every rank reports its node to the host. After that only rank 0 communicates with the host. The training loop stops
    if any rank should stop, so all ranks stop at the same step.
    """

    def __init__(self, host: Any) -> None:
        self.rank = dist.get_rank()
        self._host = host
        self._progress: Progress | None = None
        self._signs = 0  # of life
        self._asked_to_stop = False
        self._closed = threading.Event()
        node = current_node()
        self.node = node.name
        ray.get(host.join.remote(self.rank, node))
        self._thread = threading.Thread(target=self._exchange_periodically, daemon=True)
        if self.rank == 0:
            self._thread.start()

    def report(self, progress: Progress) -> None:
        """Keep the progress for the next exchange; only rank 0's is passed on."""
        self._signs += 1
        self._progress = progress

    def should_stop(self) -> bool:
        """Return True if the host asked the group to stop; always False on ranks above 0."""
        self._signs += 1
        return self._asked_to_stop

    def wait_for_rank_0(self) -> None:
        """Return when rank 0 has called this too.

        Not a barrier, because rank 0 may write a large checkpoint for longer than a collective may take. If rank 0
        dies, Ray Train stops this process.
        """
        if self.rank == 0:
            ray.get(self._host.group_stopped.remote())
            return
        while not ray.get(self._host.has_group_stopped.remote()):
            time.sleep(EXCHANGE_SECONDS)

    def close(self) -> None:
        """Pass on the last progress, and stop exchanging."""
        self._closed.set()
        if self.rank == 0:
            self._thread.join()

    def _exchange_periodically(self) -> None:
        while True:
            last = self._closed.wait(EXCHANGE_SECONDS)
            try:
                self._asked_to_stop = ray.get(self._host.exchange.remote(self._progress, self._signs))
            except RayError:  # an OutOfMemoryError is no RayActorError
                return  # the host is gone, so Ray Train will stop this process
            if last:
                return


def root_cause(error: TrainingFailedError) -> BaseException:
    """Return the error that ended a process group, rather than the errors that its end caused on other ranks."""
    if not isinstance(error, WorkerGroupError):
        return TrainingError(f"Ray Train gave up: {one_line(error)}")
    failures: dict[int, BaseException] = {}
    for rank, failure in sorted(error.worker_failures.items()):
        # Ray Train wraps the exception of a rank to keep its traceback, and also the failed health check of a dead rank
        base = getattr(failure, "_base_exc", getattr(failure, "health_check_failure", failure))
        base.add_note(f"on rank {rank}:\n{failure}")
        failures[rank] = base
    first = min(failures.values(), key=root_cause_rank)  # the lowest rank's, among equals
    if isinstance(first, RayActorError):
        dead = [str(rank) for rank, failure in failures.items() if isinstance(failure, RayActorError)]
        return TrainingError(f"the process or the node of rank {', '.join(dead)} died")
    return first


def root_cause_rank(failure: BaseException) -> int:
    """Return how likely an exception is the root cause of a group's end; lower is likelier.

    0: an error of this package. 1: any other error. 2: a process that died without an error. 3: a collective that
    failed, maybe without another failure. 4: a collective that failed because another rank was lost.
    """
    if isinstance(failure, BamError):
        return 0
    if isinstance(failure, RayActorError):
        return 2
    if PEER_LOST.search(str(failure)):
        return 4
    return 3 if isinstance(failure, dist.DistError) else 1
