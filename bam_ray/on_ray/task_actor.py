"""The actor that runs one task: the stage works on a thread, the actor's methods answer at once.

A method of an actor cannot be cancelled, and one that is busy answers nothing; so `start` only begins an `Attempt`,
and with `max_concurrency=2` a slow answer never holds up the next question. Errors travel as text inside sightings, so
that the driver can read them whatever they are made of.
"""

import logging
import os
from collections import deque
from dataclasses import replace
from typing import Any

import ray

from bam_ray.control.attempt import LOG_LINES, Attempt
from bam_ray.control.observations import Alive, Queued, Sighting
from bam_ray.errors import Interrupted
from bam_ray.on_ray.cluster import living_nodes
from bam_ray.on_ray.gauges import Gauges
from bam_ray.on_ray.work import Work
from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import Progress, StageContext

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


class TaskActor:
    """Runs one attempt at one task; also the line between a group's ranks and the driver."""

    def __init__(self) -> None:
        quiet()
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        keep_log(self._log)
        self._attempt: Attempt | None = None
        self._nodes: set[str] = set()  # of a group's ranks
        self._group_stopped = False

    def start(self, work: Work) -> Node:
        """Begin; returns where."""
        run = self._run_group if work.task.is_group else self._run_stage
        self._attempt = Attempt(lambda context: run(work, context), here(), self._log)
        self._gauges = Gauges(work.task.kind, work.task.name)
        self._attempt.start()
        return self._attempt.where

    def poll(self) -> Sighting:
        """How the attempt stands."""
        assert self._attempt is not None
        sighting = self._attempt.look()
        if not isinstance(sighting, Queued):
            self._gauges.show(sighting.progress)
        return replace(sighting, nodes=frozenset(self._nodes)) if isinstance(sighting, Alive) else sighting

    def drain(self) -> None:
        """Ask the stage to write a checkpoint and stop."""
        assert self._attempt is not None
        self._attempt.drain()

    def join(self, rank: int, node: Node) -> None:
        """A rank of a group says where it is."""
        assert self._attempt is not None
        self._nodes.add(node.id)
        if rank == 0:
            self._attempt.where = node

    def exchange(self, progress: Progress | None) -> bool:
        """Rank 0 of a group says how far it is, and learns whether the group should stop."""
        assert self._attempt is not None
        if progress:
            self._attempt.report(progress)
        return self._attempt.should_stop()

    def group_stopped(self) -> None:
        """Rank 0 of a group says that all ranks stopped cleanly, as they were asked to."""
        self._group_stopped = True

    def _run_stage(self, work: Work, context: StageContext) -> None:
        use_threads(work.task.needs.cpus)
        work.functions.run_stage(work.task.kind, work.task.name, work.recipe, work.store, context)

    def _run_group(self, work: Work, context: StageContext) -> None:
        from bam_ray.on_ray.group import run_group

        context.report(Progress(0, work.task.total_steps, note=f"gathering {work.task.workers} processes"))
        run_group(work, ray.get_runtime_context().current_actor)
        if self._group_stopped:
            raise Interrupted(f"{work.task.kind}/{work.task.name} stopped, as it was asked to")


def here() -> Node:
    """The node that this process runs on."""
    id = ray.get_runtime_context().get_node_id()
    return next(Node(node.id, node.name) for node in living_nodes() if node.id == id)


def quiet() -> None:
    """No progress bars and banners from libraries: nobody reads a worker's output."""
    os.environ.update(QUIET)


def use_threads(cpus: float) -> None:
    """Compute with as many threads as CPUs were asked for: nodes are shared."""
    import torch

    torch.set_num_threads(max(1, int(cpus)))


def keep_log(lines: deque[str]) -> None:
    """Keep what this process logs, to be shown with an error."""

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    keeper = Keeper()
    keeper.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(keeper)
    logging.getLogger("bam_ray").setLevel(logging.INFO)


def remote_class() -> Any:
    """`TaskActor` as a Ray actor class."""
    return ray.remote(TaskActor)
