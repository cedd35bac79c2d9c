"""Placement of tasks that failed on a node.

They go to other nodes, but no node idles because of one failure, and the tasks behind them do not wait.
"""

from bam_ray.pipeline.states import History
from bam_ray.pipeline.tasks import Task
from bam_ray.scheduling.cluster_view import ClusterView
from bam_ray.scheduling.speed_placement import SpeedPlacement
from bam_ray.scheduling.throughput import ThroughputTracker
from tests.support.control.scripted_launcher import make_measurable_task, make_node

FAST = frozenset({"fast"})


def place(
    view: ClusterView, throughput: ThroughputTracker | None = None, **waiting: History
) -> dict[str, tuple[object, object]]:
    """Return (node id, nodes to avoid) of each task in `waiting` that starts now; the first is the longest."""
    placement = SpeedPlacement(
        view, throughput or ThroughputTracker(), 0.0, {node_id: node.kind for node_id, node in view.nodes.items()}
    )
    for number, (name, history) in enumerate(waiting.items()):
        task: Task = make_measurable_task(name, steps=100 - number)
        placement.add_waiting(task, None, history)
    return {task.id: (node_id, avoid) for task, node_id, avoid in placement.starts()}


def make_view(slow_is_free: bool) -> ClusterView:
    """Return a cluster whose fast node is free."""
    return ClusterView([make_node("fast"), make_node("slow", free=1.0 if slow_is_free else 0.0)])


def equal_speeds() -> ThroughputTracker:
    """Return equal measured speeds for both nodes."""
    tracker = ThroughputTracker()
    for each in (make_node("fast"), make_node("slow")):
        tracker.record_rate(("dense", "1 CPU"), each.kind, "a", 1.0)
    return tracker


def test_a_failed_task_goes_to_another_free_node() -> None:
    once = History(failures=1, avoid=FAST)
    assert place(make_view(slow_is_free=True), a=once) == {"a": (None, FAST)}
    assert place(make_view(slow_is_free=True), equal_speeds(), a=once) == {"a": ("slow", frozenset())}


def test_after_one_failure_a_task_returns_if_other_nodes_are_busy() -> None:
    once = History(failures=1, avoid=FAST)
    assert place(make_view(slow_is_free=False), a=once) == {"a": (None, frozenset())}
    assert place(make_view(slow_is_free=False), equal_speeds(), a=once) == {"a": ("fast", frozenset())}


def test_after_two_failures_a_task_waits_and_lets_the_next_one_start() -> None:
    twice = History(failures=2, avoid=FAST)
    assert place(make_view(slow_is_free=False), a=twice, b=History()) == {"b": (None, frozenset())}
    assert place(make_view(slow_is_free=False), equal_speeds(), a=twice, b=History()) == {"b": ("fast", frozenset())}
    assert place(ClusterView([make_node("fast")]), a=twice) == {"a": (None, frozenset())}, "there is no other node"
