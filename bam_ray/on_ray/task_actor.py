"""The actor that runs one task: the stage works on a thread, and the actor's methods answer at once.

A method of an actor cannot be cancelled, and an actor that is busy in a method does not answer. Therefore `start` only
starts an `Attempt`, and with `max_concurrency=2` a slow answer never delays the next call. Errors are returned as text,
so that the driver can read them even if it cannot import their class.
"""

import os
from collections import deque
from dataclasses import replace
from typing import Any

import ray

from bam_ray.control.attempt import LOG_LINES, Attempt
from bam_ray.control.observations import Alive, AttemptStatus, Queued
from bam_ray.errors import Interrupted
from bam_ray.on_ray.gauges import Gauges
from bam_ray.on_ray.work import Work
from bam_ray.on_ray.worker_env import current_node, device_environment, keep_log, limit_threads, silence_libraries
from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import Progress, StageContext


class TaskActor:
    """The actor of one attempt at one task, which also connects the ranks of a process group with the driver."""

    def __init__(self) -> None:
        silence_libraries()
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        keep_log(self._log)
        self._attempt: Attempt | None = None
        self._nodes: set[str] = set()  # ids of the nodes that ranks of a process group run on
        self._group_stopped = False

    def start(self, work: Work) -> Node:
        """Start the attempt, and return the node that it runs on."""
        run = self._run_group if work.task.is_group else self._run_stage
        # This process has not imported torch yet. The ranks of a process group have the GPUs, not their host.
        os.environ.update(device_environment(0.0 if work.task.is_group else work.task.needs.gpus))
        self._attempt = Attempt(lambda context: run(work, context), current_node(), self._log)
        self._gauges = Gauges(work.task.kind, work.task.name)
        self._attempt.start()
        return self._attempt.host

    def poll(self) -> AttemptStatus:
        """Return the status of the attempt, and update the gauges."""
        assert self._attempt is not None
        status = self._attempt.poll()
        if not isinstance(status, Queued):
            self._gauges.update(status.progress)
        return replace(status, nodes=frozenset(self._nodes)) if isinstance(status, Alive) else status

    def drain(self) -> None:
        """Ask the stage to write a checkpoint and stop."""
        assert self._attempt is not None
        self._attempt.drain()

    def join(self, rank: int, node: Node) -> None:
        """Record the node of a rank; called by every rank of a process group."""
        assert self._attempt is not None
        self._nodes.add(node.id)
        if rank == 0:
            self._attempt.host = node

    def exchange(self, progress: Progress | None, signs: int) -> bool:
        """Record the progress and the signs of life, and return True if the group should stop; called by rank 0."""
        assert self._attempt is not None
        if progress:
            self._attempt.report(progress)
        stop = self._attempt.should_stop()
        self._attempt.signs = signs
        return stop

    def group_stopped(self) -> None:
        """Record that the ranks have stopped cleanly after a drain; called by rank 0 after it wrote its checkpoint."""
        self._group_stopped = True

    def has_group_stopped(self) -> bool:
        """Return True if rank 0 has stopped cleanly after a drain; called by the other ranks."""
        return self._group_stopped

    def _run_stage(self, work: Work, context: StageContext) -> None:
        limit_threads(work.task.needs.cpus)
        work.execute(context)

    def _run_group(self, work: Work, context: StageContext) -> None:
        from bam_ray.on_ray.group import run_group  # torch and Ray Train: the driver imports this module without them

        if work.task_run(context).finished() is not None:
            return
        context.report(Progress(0, work.task.total_steps, note=f"gathering {work.task.workers} processes"))
        run_group(work, ray.get_runtime_context().current_actor)
        if self._group_stopped:
            raise Interrupted(f"{work.task.kind}/{work.task.name} stopped as requested")


def remote_class() -> Any:
    """Return `TaskActor` as a Ray actor class."""
    return ray.remote(TaskActor)
