"""The processes of a mixture, or of a seed or branch with several workers: ranks that train together, under Ray Train.

Ray Train places the ranks, joins them into a torch process group and takes all of them down when one is lost. Nothing
else of it is used: checkpoints go to the blob store as everything does, and whether to try again is the controller's
to say, so that one policy and one table cover all tasks. `run_group` blocks; it runs on the thread of a `TaskActor`.
"""

import os
import re
import tempfile
import threading
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from bam_ray.errors import BamError, Interrupted, TrainingError, one_line
from bam_ray.on_ray.task_actor import here, quiet, use_threads
from bam_ray.on_ray.work import Work
from bam_ray.pipeline.tasks import Progress
from bam_ray.scheduling.nodes import resources_of

EXCHANGE_EVERY = 1.0  # seconds between rank 0's words with the driver
# gloo's words, and the last NCCL's
OTHER_WENT = re.compile(
    "connection (closed|reset) by peer|broken pipe|timed out waiting|application timeout caused pair closure|"
    "remote process exited or there was a network error",
    re.IGNORECASE,
)


def run_group(work: Work, host: Any) -> None:
    """Do a training task on `work.task.workers` processes; `host` is the `TaskActor` they report to.

    Returns when all ranks have returned; raises the error that ended the group.
    """
    # Ray Train would move the ranks into a folder of its own: relative paths of a recipe keep their meaning
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"

    def rank() -> None:
        run_rank(work, host)

    needs = work.task.needs
    with tempfile.TemporaryDirectory(prefix="bam-train-") as folder:  # Ray Train's own notes, of no use afterwards
        trainer = TorchTrainer(
            rank,
            torch_config=TorchConfig(backend="nccl" if needs.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=work.task.workers,
                use_gpu=needs.gpus > 0,
                resources_per_worker=resources_of(needs),
                label_selector=work.selector or None,
            ),
            run_config=RunConfig(
                name=work.task.id,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise cause(error) from error


def run_rank(work: Work, host: Any) -> None:
    """One rank: train, saying on rank 0 how far it is."""
    quiet()
    use_threads(work.task.needs.cpus)
    context = RankContext(host)
    try:
        task = work.task
        work.functions.run_rank(task.kind, task.name, work.recipe, work.store, context, work.engine_factory)
    except Interrupted:
        # Ray Train ends the group with the first rank that fails. None does here, and none leaves early: rank 0 may
        # still be writing the checkpoint
        dist.barrier()
        if context.rank == 0:
            ray.get(host.group_stopped.remote())
    finally:
        context.close()


class RankContext:
    """The `StageContext` of one rank. Each tells the host where it is; after that only rank 0's speaks with it.

    The training loop stops where any rank should stop, so all stop at the same step.
    """

    def __init__(self, host: Any) -> None:
        self.rank = dist.get_rank()
        self._host = host
        self._progress: Progress | None = None
        self._asked_to_stop = False
        self._closed = threading.Event()
        where = here()
        self.node = where.name
        ray.get(host.join.remote(self.rank, where))
        self._thread = threading.Thread(target=self._exchange_often, daemon=True)
        if self.rank == 0:
            self._thread.start()

    def report(self, progress: Progress) -> None:
        """Of `StageContext`; what other ranks than 0 say is not passed on."""
        self._progress = progress

    def should_stop(self) -> bool:
        """Of `StageContext`; always False on other ranks than 0."""
        return self._asked_to_stop

    def close(self) -> None:
        """Pass on the last progress."""
        self._closed.set()
        if self.rank == 0:
            self._thread.join()

    def _exchange_often(self) -> None:
        while True:
            last = self._closed.wait(EXCHANGE_EVERY)
            try:
                self._asked_to_stop = ray.get(self._host.exchange.remote(self._progress))
            except RayActorError:
                return  # without a host Ray Train takes this process down
            if last:
                return


def cause(error: TrainingFailedError) -> BaseException:
    """The error that ended a group: what a rank itself raised, before what its end did to others."""
    if not isinstance(error, WorkerGroupError):
        return TrainingError(f"Ray Train gave up: {one_line(error)}")
    failures: dict[int, BaseException] = {}
    for rank, failure in sorted(error.worker_failures.items()):
        # Ray Train wraps what a rank raised, to keep its traceback, and what asking a dead one how it is does
        base = getattr(failure, "_base_exc", getattr(failure, "health_check_failure", failure))
        base.add_note(f"on rank {rank}:\n{failure}")
        failures[rank] = base
    first = min(failures.values(), key=remoteness)  # of the lowest rank among the like
    if isinstance(first, RayActorError):
        dead = [str(rank) for rank, failure in failures.items() if isinstance(failure, RayActorError)]
        return TrainingError(f"the process or the node of rank {', '.join(dead)} died")
    return first


def remoteness(failure: BaseException) -> int:
    """How far from the cause of a group's end what a rank ended with is: an error of ours, any other, a death without
    a word, a collective that failed (for a reason of its own, maybe), and one that failed because another rank went."""
    if isinstance(failure, BamError):
        return 0
    if isinstance(failure, RayActorError):
        return 2
    if OTHER_WENT.search(str(failure)):
        return 4
    return 3 if isinstance(failure, dist.DistError) else 1
