"""Decide which tasks start now, on which nodes, and which running tasks move: pure functions over one cluster view.

Tasks that train alone are placed by speed (`speed_placement`). All others, groups among them, start in the order of
their remaining steps while the launcher's queue is short. If the launcher chooses nodes itself, there is no cluster
view, and every task goes to the launcher's queue.

Tasks that give way are placed after all others. If another task waits for nodes, they do not start there, and those
that run there are drained.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from bam_ray.errors import PlacementError
from bam_ray.pipeline.states import Active, Draining, History, Placing, Running
from bam_ray.pipeline.tasks import Progress, Task
from bam_ray.scheduling import elastic
from bam_ray.scheduling.cluster_view import ClusterView
from bam_ray.scheduling.speed_placement import SpeedPlacement
from bam_ray.scheduling.throughput import ThroughputGroup, ThroughputTracker

MAX_PENDING = 32  # tasks in the launcher's queue: enough to keep nodes busy, few enough that our order still matters


class ReadyTask(NamedTuple):
    """A task that can start."""

    task: Task
    history: History
    progress: Progress | None  # of its last attempt


class ActiveTask(NamedTuple):
    """A task with an attempt; `task` carries the chosen resource request and number of workers."""

    task: Task
    group: ThroughputGroup
    state: Active


@dataclass(frozen=True)
class Start:
    """Start an attempt now.

    Attributes:
        task: The task with the chosen resource request and number of workers.
        group: The throughput group that the attempt is measured in.
        avoid: Ids of nodes that the launcher should avoid if it chooses the node.
        node_id: The node to start on; None lets the launcher choose.
        message: About the placement, such as a fallback that was chosen.
        no_capacity_since: Since when the cluster could not hold all configured workers.
    """

    task: Task
    group: ThroughputGroup
    avoid: frozenset[str] = frozenset()
    node_id: str | None = None
    message: str = ""
    no_capacity_since: float | None = None


@dataclass(frozen=True)
class Move:
    """Drain a running task, so that it continues on another node, or later."""

    task_id: str
    reason: str = "moved"  # the cause in the record of the attempt


@dataclass(frozen=True)
class NoCapacity:
    """The living nodes could not hold a task even if they were idle."""

    task_id: str
    error: PlacementError
    no_capacity_since: float | None


PlacementDecision = Start | Move | NoCapacity


def plan_placement(
    ready: Sequence[ReadyTask],
    active: Sequence[ActiveTask],
    view: ClusterView | None,
    throughput: ThroughputTracker,
    kinds: Mapping[str, str],
    now: float,
) -> Iterator[PlacementDecision]:
    """Decide what happens to all tasks that are ready or active.

    Args:
        ready: The tasks that can start.
        active: The tasks that have an attempt.
        view: The cluster; capacity is reserved in it. None: the launcher chooses among its own nodes.
        throughput: The measured speeds and costs.
        kinds: The kinds of all known nodes, by node id.
        now: The time on the controller's clock.
    """
    if view is None:
        for each in choose_queued(ready, active):
            yield Start(each.task, (each.task.model, ""), each.history.avoid)
        return
    first = [each for each in ready if not each.task.gives_way]
    placed = [each for each in active if not each.task.gives_way]
    started: dict[str, Task] = {}
    moving = {each.task.id for each in placed if isinstance(each.state, Draining)}
    for decision in _place(first, placed, view, throughput, kinds, now):
        match decision:
            case Start(task):
                started[task.id] = task
            case Move(task_id):
                moving.add(task_id)
        yield decision
    later = [each for each in ready if each.task.gives_way]
    running = [each for each in active if each.task.gives_way]
    if later or running:
        waiting = _waiting(first, placed, started, view)
        _withhold_soon_taken(placed, moving, view)
        withheld = {node.id: task for task in waiting for node in view.fitting_nodes(view.choose_request(task).needs)}
        view.withhold(withheld)
        for move in _make_way(running, withheld):
            running = [each for each in running if each.task.id != move.task_id]
            yield move
        yield from _place(later, running, view, throughput, kinds, now)


def _place(
    ready: Sequence[ReadyTask],
    active: Sequence[ActiveTask],
    view: ClusterView,
    throughput: ThroughputTracker,
    kinds: Mapping[str, str],
    now: float,
) -> Iterator[PlacementDecision]:
    """Place tasks of equal priority. The arguments are those of `plan_placement`."""
    for each in choose_queued([each for each in ready if not each.task.trains_alone], active):
        avoid = _nodes_to_avoid(each, view)
        if _reserve_group(each.task, view, avoid):
            yield _start(each, view, now, avoid)
    alone = [each for each in ready if each.task.trains_alone]
    training = [each for each in active if each.task.trains_alone]
    yield from _plan_by_speed(alone, training, view, SpeedPlacement(view, throughput, now, kinds), now)


def _waiting(
    ready: Sequence[ReadyTask], active: Sequence[ActiveTask], started: Mapping[str, Task], view: ClusterView
) -> list[Task]:
    """Return the tasks that wait for nodes, although the cluster could hold them.

    Args:
        ready: The tasks that can start.
        active: The tasks that have an attempt.
        started: Those of `ready` that start now, by id, with the chosen resource requests and numbers of workers.
        view: The cluster after these starts; capacity is reserved in it for tasks that start in the launcher's queue.
    """
    waiting = []
    queued = choose_queued([each for each in ready if not each.task.trains_alone], active)
    for task in (each.task for each in (*queued, *(each for each in ready if each.task.trains_alone))):
        placed = started.get(task.id)
        if placed is None and view.can_hold(task):
            waiting.append(task)
        elif placed is not None and not _has_room(task, placed, view):
            waiting.append(placed)
    return waiting


def _has_room(task: Task, placed: Task, view: ClusterView) -> bool:
    """Return True if the nodes have room for a task that was just placed; reserve the room if that was not done yet."""
    if task.trains_alone or (task.is_group and view.can_hold(task)):
        return True
    return all([view.reserve_any(placed.needs) for _ in range(placed.workers)])


def _withhold_soon_taken(active: Iterable[ActiveTask], moving: Collection[str], view: ClusterView) -> None:
    """Withhold the nodes that tasks in the launcher's queue, or tasks that move, will start on.

    Args:
        active: The tasks that have an attempt.
        moving: The ids of those that leave their nodes.
        view: The cluster.
    """
    for task, _, state in active:
        is_queued = isinstance(state, Placing) and state.node_id is None and not task.trains_alone
        lacks_room = is_queued and not all([view.reserve_any(task.needs) for _ in range(task.workers)])
        if lacks_room or task.id in moving:
            view.withhold(node.id for node in view.fitting_nodes(task.needs))


def _make_way(running: Iterable[ActiveTask], withheld: Mapping[str, Task]) -> Iterator[Move]:
    """Drain the running tasks on nodes that other tasks wait for; `withheld` has such a task by node id."""
    for each in running:
        if isinstance(each.state, Running):
            others = [withheld[id] for id in (each.state.node.id, *each.state.nodes) if id in withheld]
            if others:
                yield Move(each.task.id, f"made way for {others[0].full_name}")


def choose_queued(ready: Iterable[ReadyTask], active: Iterable[ActiveTask]) -> list[ReadyTask]:
    """Return the ready tasks to hand to the launcher now, the longest first, while its queue is short.

    Tasks that give way come after all others. `Task.at_once` limits how many tasks of one kind are active at the same
    time.
    """
    together: Counter[str] = Counter()
    pending = 0
    for placed in active:
        together[placed.task.kind] += 1
        pending += isinstance(placed.state, Placing) and placed.state.node_id is None
    chosen: list[ReadyTask] = []
    for each in sorted(ready, key=_order):
        task = each.task
        if pending + len(chosen) >= MAX_PENDING:
            break
        if task.at_once is None or together[task.kind] < task.at_once:
            chosen.append(each)
            together[task.kind] += 1
    return chosen


def _order(ready: ReadyTask) -> tuple[bool, int]:
    return ready.task.gives_way, -ready.task.remaining_steps(ready.progress)


def is_stranded(task: Task, waited: float, view: ClusterView) -> bool:
    """Return True if a group, `waited` seconds after it was placed, waits for ranks that no living node can hold."""
    return task.is_group and waited > elastic.SHRINK_TIMEOUT and not view.can_hold(task)


def _plan_by_speed(
    ready: Sequence[ReadyTask], active: Iterable[ActiveTask], view: ClusterView, placement: SpeedPlacement, now: float
) -> Iterator[PlacementDecision]:
    """Decide what happens to the tasks that train alone."""
    for placed in active:
        placement.add_active(placed.task, placed.group, placed.state)
    for each in ready:
        try:
            placement.add_waiting(each.task, each.progress, each.history)
        except PlacementError as error:
            yield NoCapacity(each.task.id, error, each.history.no_capacity_since)
    for task_id in placement.moves():
        placement.mark_leaving(task_id)
        yield Move(task_id)
    by_id = {each.task.id: each for each in ready}
    for task, node_id, avoid in placement.starts():
        yield _start(by_id[task.id], view, now, avoid, node_id)


def _nodes_to_avoid(ready: ReadyTask, view: ClusterView) -> frozenset[str]:
    """Return the nodes that a task whose node the launcher chooses should not start on now."""
    task, history = ready.task, ready.history
    if not view.can_hold(task):
        return history.avoid
    needs = view.choose_request(task).needs
    return view.nodes_to_avoid(needs, history.avoid, task.workers, history.waits_for_other_nodes)


def _reserve_group(task: Task, view: ClusterView, avoid: frozenset[str]) -> bool:
    """Reserve capacity for all workers of a group; return False if they do not all fit now.

    The capacity of a group that does not fit stays reserved in the view, so that no other task takes it.
    """
    if not task.is_group or not view.can_hold(task):
        return True
    needs = view.choose_request(task).needs
    return all([view.reserve_any(needs, avoid) for _ in range(task.workers)])


def _start(
    ready: ReadyTask, view: ClusterView, now: float, avoid: frozenset[str], node_id: str | None = None
) -> Start | NoCapacity:
    """Start a task with the first of its resource requests that the cluster can satisfy."""
    task, since = _fit_workers(ready, view, now)
    try:
        request = view.choose_request(task)
    except PlacementError as error:
        return NoCapacity(task.id, error, since)
    message = request.message
    if task.workers < ready.task.workers:
        message = f"continues with {task.workers} of {ready.task.workers} workers"
    return Start(replace(task, needs=request.needs), request.group, avoid, node_id, message, since)


def _fit_workers(ready: ReadyTask, view: ClusterView, now: float) -> tuple[Task, float | None]:
    """Return the task, with fewer workers if all have not fit for too long, and since when they have not fit."""
    task = ready.task
    if view.can_hold(task):
        return task, None
    since = now if ready.history.no_capacity_since is None else ready.history.no_capacity_since
    if now - since < elastic.SHRINK_TIMEOUT:
        return task, since
    return elastic.with_fewer_workers(task, view.can_hold) or task, since
