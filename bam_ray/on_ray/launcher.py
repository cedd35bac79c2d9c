"""The controller's launcher on Ray: one actor per task.

If the controller chose a node, the actor is placed there by a label that Ray gives to each node. Otherwise Ray chooses
a node, and keeps the actor in its queue while no node has free resources. Calls to an actor never block the driver:
each call is an object reference that is checked at every poll until the answer has arrived.

An actor that cannot be reached (`ActorUnavailableError`) may still run behind a network partition, and come back.
Another attempt would then run beside it, and Ray might place it on the node that is just dying. So the launcher repeats
its call until the actor answers or Ray's head node declares it dead. After that, the controller avoids the node on
which it died.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bam_ray.control.attempt import LOG_LINES
from bam_ray.control.observations import Alive, AttemptStatus, Crashed, Queued
from bam_ray.control.transitions import PlacedTask
from bam_ray.on_ray.cluster import free_resources, living_nodes
from bam_ray.on_ray.deaths import describe_death
from bam_ray.on_ray.task_actor import remote_class
from bam_ray.on_ray.work import StageFunctions, Work
from bam_ray.pipeline.run import PipelineRun
from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.nodes import NODE_ID, NodeFacts, label_selector, ray_resources

if TYPE_CHECKING:
    from bam_ray.training.engine import EngineFactory

ANSWER_SECONDS = 0.5  # time that a poll waits for answers; later ones are read at the next poll
UNREACHABLE_TIMEOUT = 300.0  # seconds after which an actor that cannot be reached is killed


@dataclass
class _PlacedActor:
    """The actor of one attempt, and the call that it has not answered yet."""

    task: Task
    actor: Any
    requested_node: str | None  # node id; None if Ray chooses
    call: Any  # reference to the answer of `start` while `node` is None, of `poll` afterwards; None: call again
    node: Node | None = None
    last: AttemptStatus = field(default_factory=Queued)
    unreachable_since: float | None = None


class RayLauncher:
    """A `Launcher` on the Ray cluster that this process is connected to."""

    def __init__(
        self,
        run: PipelineRun,
        engine_factory: "EngineFactory | None" = None,
        functions: StageFunctions | None = None,
    ) -> None:
        self._run = run
        self._engine_factory = engine_factory
        self._functions = functions or StageFunctions()
        self._actors = remote_class()
        self._placed: dict[str, _PlacedActor] = {}

    def nodes(self) -> list[NodeFacts]:
        """Return the living nodes with their free resources.

        Ray's own account may be a second old, so the resources that this launcher has assigned are subtracted too.
        """
        free = free_resources()
        assigned: dict[str, Counter[str]] = defaultdict(Counter)
        for placed in self._placed.values():
            node_id = placed.node.id if placed.node else placed.requested_node
            if node_id and not placed.task.is_group:
                assigned[node_id].update(ray_resources(placed.task.needs))
        return [
            replace(
                node,
                free={
                    name: min(free.get(node.id, {}).get(name, 0.0), total - assigned[node.id][name])
                    for name, total in node.resources.items()
                },
            )
            for node in living_nodes()
        ]

    def expect(self, tasks: Sequence[Task]) -> None:
        """Request resources for `tasks` from Ray's autoscaler.

        The autoscaler does not see tasks without a node, because they wait in the controller and not in Ray.
        """
        bundles = [ray_resources(task.needs) for task in tasks for _ in range(task.workers)]
        request_resources(bundles=[bundle for bundle in bundles if bundle])

    def place(self, placed: PlacedTask, avoid: frozenset[str], node_id: str | None = None) -> None:
        """Start an actor for the task on `node_id`; if that is None, on a node outside `avoid` if one can run it."""
        task = placed.task
        selector = {**task.needs.labels, NODE_ID: node_id} if node_id else label_selector(task, avoid, living_nodes())
        work = Work(placed, self._run, self._functions, self._engine_factory, selector)
        actor = self._actors.options(max_concurrency=2, **self._placement_options(work)).remote()
        self._placed[task.id] = _PlacedActor(task, actor, node_id, actor.start.remote(work))

    def poll(self) -> dict[str, AttemptStatus]:
        """Return the last known status of every placed attempt by task id."""
        for placed in self._placed.values():
            if placed.call is None:
                placed.call = placed.actor.poll.remote()
        self._await([placed.call for placed in self._placed.values() if placed.node], ANSWER_SECONDS)
        answered = self._await([placed.call for placed in self._placed.values()], 0.0)
        for placed in self._placed.values():
            if placed.call in answered:
                self._read_answer(placed)
        return {task_id: placed.last for task_id, placed in self._placed.items()}

    def drain(self, task_id: str) -> None:
        """Ask the attempt to write a checkpoint and stop; returns at once."""
        self._placed[task_id].actor.drain.remote()

    def free(self, task_id: str) -> None:
        """Kill the actor of the attempt and forget it."""
        ray.kill(self._placed.pop(task_id).actor)

    def close(self) -> None:
        """Free everything."""
        self.expect([])
        for task_id in list(self._placed):
            self.free(task_id)

    def _placement_options(self, work: Work) -> dict[str, Any]:
        """Return the options that place an actor."""
        if work.task.is_group:  # Ray Train places the ranks; the actor itself only connects them, beside the driver
            driver_node = ray.get_runtime_context().get_node_id()
            return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(driver_node, soft=True)}
        resources = ray_resources(work.task.needs)
        return {
            "num_cpus": resources.get("CPU", 0),
            "num_gpus": resources.get("GPU", 0),
            "memory": int(resources["memory"]) if "memory" in resources else None,
            "label_selector": work.selector or None,
            "scheduling_strategy": "SPREAD",  # the default fills one node while others are idle
        }

    def _await(self, calls: list[Any], timeout: float) -> set[Any]:
        """Return the calls that are answered within `timeout` seconds."""
        if not calls:
            return set()
        return set(ray.wait(calls, num_returns=len(calls), timeout=timeout)[0])

    def _read_answer(self, placed: _PlacedActor) -> None:
        """Update the status of an attempt from the answer to its open call."""
        call, placed.call = placed.call, None
        try:
            answer = ray.get(call)
        except ActorUnavailableError:
            self._mark_unreachable(placed)
        except RayTaskError as error:
            # The worker cannot unpickle the work, most often because a module is missing there
            lines = str(error).strip().splitlines()
            placed.last = Crashed(
                f"the attempt could not start: {lines[-1].strip()}", placed.node, log=tuple(lines[-LOG_LINES:])
            )
        except RayError as error:  # not only ActorDiedError: Ray's memory monitor leaves an OutOfMemoryError
            placed.last = self._died(placed, error)
        else:
            placed.unreachable_since = None
            if isinstance(answer, Node):
                placed.node = answer
                placed.last = Alive(answer, None)
            else:
                placed.last = answer
                placed.node = answer.node

    def _mark_unreachable(self, placed: _PlacedActor) -> None:
        """Keep the last status of an actor that cannot be reached, and call it again; kill it after a timeout."""
        now = time.monotonic()
        placed.unreachable_since = placed.unreachable_since or now
        if now - placed.unreachable_since > UNREACHABLE_TIMEOUT:
            # The next answer is ActorDiedError. The lease prevents the old attempt from committing.
            ray.kill(placed.actor)
        if placed.node is None:  # it never confirmed that it started
            placed.last = Queued()
            placed.call = placed.actor.poll.remote()

    def _died(self, placed: _PlacedActor, error: RayError) -> Crashed:
        """Return the status of an attempt whose actor is known to be dead."""
        node = placed.node
        preempted = isinstance(error, ActorDiedError) and error.preempted
        gone = preempted or (node is not None and all(node.id != living.id for living in living_nodes()))
        progress = placed.last.progress if isinstance(placed.last, Alive) else None
        if gone and node:
            message = f"node {node.name} {'was preempted' if preempted else 'died'}"
        else:
            message = describe_death(error, placed.task, node.name if node else None)
        return Crashed(message, node, progress or Progress(0, placed.task.total_steps), node_fault=gone)
