"""The controller's launcher on Ray: one actor per task.

An actor is placed on the node that the controller chose, by a label that Ray gives each node, else wherever Ray finds
room; where there is none it waits in Ray's queue. What is asked of an actor never blocks the driver: each question is a
reference that is looked at until it is answered.

An actor that cannot be reached may live on, cut off, and come back (`ActorUnavailableError` says no more than that).
To begin another attempt then would make two, and Ray may well place the second on the node that is just dying. So such
an actor is asked again until it answers or Ray's head has declared it dead; a node it died on is avoided from then on.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bam_ray.blobs import BlobStore
from bam_ray.control.attempt import LOG_LINES
from bam_ray.control.observations import Alive, Broke, Queued, Sighting
from bam_ray.on_ray.cluster import free_resources, living_nodes
from bam_ray.on_ray.task_actor import remote_class
from bam_ray.on_ray.work import EngineFactory, StageFunctions, Work
from bam_ray.pipeline.states import Node
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling.nodes import NODE_ID, NodeFacts, resources_of, selector_of
from bam_ray.settings import Recipe

ANSWER_WAIT = 0.5  # seconds that a poll waits for answers; those that come later are seen at the next
UNREACHABLE_PATIENCE = 300.0  # seconds after which an actor that cannot be reached is declared dead


@dataclass
class _Placed:
    """One attempt: its actor, and the question that is open."""

    task: Task
    actor: Any
    meant_for: str | None  # the id of a node
    question: Any  # of `start` while there is no node, of `poll` afterwards; None: ask
    node: Node | None = None
    last: Sighting = field(default_factory=Queued)
    unreachable_since: float | None = None


class RayLauncher:
    """A `Launcher` over the cluster that this process is connected to."""

    def __init__(
        self,
        recipe: Recipe,
        store: BlobStore,
        engine_factory: EngineFactory | None = None,
        functions: StageFunctions | None = None,
    ) -> None:
        self._recipe = recipe
        self._store = store
        self._engine_factory = engine_factory
        self._functions = functions or StageFunctions()
        self._actors = remote_class()
        self._placed: dict[str, _Placed] = {}

    def nodes(self) -> list[NodeFacts]:
        """Of Ray's account of what is free, which may be a second old, what this launcher gave away is taken off."""
        free = free_resources()
        given: dict[str, Counter[str]] = defaultdict(Counter)
        for placed in self._placed.values():
            node_id = placed.node.id if placed.node else placed.meant_for
            if node_id and not placed.task.is_group:
                given[node_id].update(resources_of(placed.task.needs))
        return [
            replace(
                node,
                free={
                    name: min(free.get(node.id, {}).get(name, 0.0), there - given[node.id][name])
                    for name, there in node.resources.items()
                },
            )
            for node in living_nodes()
        ]

    def expect(self, tasks: Sequence[Task]) -> None:
        """Ray's autoscaler, where there is one, sees no queue: what has no node yet waits with the controller."""
        bundles = [resources_of(task.needs) for task in tasks for _ in range(task.workers)]
        request_resources(bundles=[bundle for bundle in bundles if bundle])

    def place(self, task: Task, avoid: frozenset[str], node_id: str | None = None) -> None:
        selector = {**task.needs.labels, NODE_ID: node_id} if node_id else selector_of(task, avoid, living_nodes())
        work = Work(task, self._recipe, self._store, self._functions, self._engine_factory, selector)
        actor = self._actors.options(max_concurrency=2, **self._where(work)).remote()
        self._placed[task.id] = _Placed(task, actor, node_id, actor.start.remote(work))

    def poll(self) -> dict[str, Sighting]:
        for placed in self._placed.values():
            if placed.question is None:
                placed.question = placed.actor.poll.remote()
        self._await([placed.question for placed in self._placed.values() if placed.node], ANSWER_WAIT)
        answered = self._await([placed.question for placed in self._placed.values()], 0.0)
        for placed in self._placed.values():
            if placed.question in answered:
                self._hear(placed)
        return {task_id: placed.last for task_id, placed in self._placed.items()}

    def drain(self, task_id: str) -> None:
        self._placed[task_id].actor.drain.remote()

    def free(self, task_id: str) -> None:
        ray.kill(self._placed.pop(task_id).actor)

    def close(self) -> None:
        """Free everything."""
        self.expect([])
        for task_id in list(self._placed):
            self.free(task_id)

    def _where(self, work: Work) -> dict[str, Any]:
        """Options that place an actor."""
        if work.task.is_group:  # the actor only hosts it: Ray Train places the ranks, and does so beside the driver
            driver_node = ray.get_runtime_context().get_node_id()
            return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(driver_node, soft=True)}
        resources = resources_of(work.task.needs)
        return {
            "num_cpus": resources.get("CPU", 0),
            "num_gpus": resources.get("GPU", 0),
            "memory": int(resources["memory"]) if "memory" in resources else None,
            "label_selector": work.selector or None,
            "scheduling_strategy": "SPREAD",  # the default packs nodes while others idle
        }

    def _await(self, questions: list[Any], timeout: float) -> set[Any]:
        if not questions:
            return set()
        return set(ray.wait(questions, num_returns=len(questions), timeout=timeout)[0])

    def _hear(self, placed: _Placed) -> None:
        """Take in the answer to an open question."""
        question, placed.question = placed.question, None
        try:
            answer = ray.get(question)
        except ActorUnavailableError:
            self._hear_nothing(placed)
        except ActorDiedError as error:
            placed.last = self._death(placed, error)
        except RayTaskError as error:  # the work could not even be read there: most often a module that is missing
            lines = str(error).strip().splitlines()
            placed.last = Broke(f"it could not begin: {lines[-1].strip()}", placed.node, log=tuple(lines[-LOG_LINES:]))
        else:
            placed.unreachable_since = None
            if isinstance(answer, Node):
                placed.node = answer
                placed.last = Alive(answer, None)
            else:
                placed.last = answer
                placed.node = answer.node

    def _hear_nothing(self, placed: _Placed) -> None:
        """Neither alive nor dead: leave it as it was last seen, and ask again."""
        now = time.monotonic()
        placed.unreachable_since = placed.unreachable_since or now
        if now - placed.unreachable_since > UNREACHABLE_PATIENCE:
            ray.kill(placed.actor)  # the next answer is ActorDiedError; leases fence off what it may still write
        if placed.node is None:  # it never said that it began
            placed.last = Queued()
            placed.question = placed.actor.poll.remote()

    def _death(self, placed: _Placed, error: ActorDiedError) -> Broke:
        """What to say of an actor that is known to be dead."""
        node = placed.node
        gone = error.preempted or (node is not None and all(node.id != living.id for living in living_nodes()))
        progress = placed.last.progress if isinstance(placed.last, Alive) else None
        if gone and node:
            said = f"node {node.name} {'was preempted' if error.preempted else 'died'}"
        else:
            said = f"its process died: {_reason(error)}"
        return Broke(said, node, progress or Progress(0, placed.task.total_steps), node_fault=gone)


def _reason(error: ActorDiedError) -> str:
    """The telling part of Ray's account, which begins with lines of ids."""
    told = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    return " ".join(" ".join(told[1:] or told).split())
