"""Where tasks go that failed on a node: elsewhere, but no node idles for one failure, and nobody behind them waits."""

from bam_ray.pipeline.states import History
from bam_ray.pipeline.tasks import Task
from bam_ray.scheduling.cluster_view import Snapshot
from bam_ray.scheduling.placement import Placement
from bam_ray.scheduling.throughput import Speeds
from tests.support.control.scripted_launcher import make_measurable_task, make_node

FAST = frozenset({"fast"})


def placed(snapshot: Snapshot, speeds: Speeds | None = None, **waiting: History) -> dict[str, tuple[object, object]]:
    """Where each of `waiting`, the longest first, is to begin now, and what it is to keep off."""
    placement = Placement(snapshot, speeds or Speeds(), 0.0, {name: kind.kind for name, kind in snapshot.nodes.items()})
    for number, (name, history) in enumerate(waiting.items()):
        task: Task = make_measurable_task(name, steps=100 - number)
        placement.add_waiting(task, None, history)
    return {task.id: (node_id, avoid) for task, node_id, avoid in placement.to_place()}


def look(slow_is_free: bool) -> Snapshot:
    return Snapshot([make_node("fast"), make_node("slow", free=1.0 if slow_is_free else 0.0)])


def measured() -> Speeds:
    speeds = Speeds()
    for each in (make_node("fast"), make_node("slow")):
        speeds.saw(("dense", "1 CPU"), each.kind, "a", 1.0)
    return speeds


def test_a_task_that_failed_goes_to_another_node_that_is_free() -> None:
    once = History(failures=1, avoid=FAST)
    assert placed(look(slow_is_free=True), a=once) == {"a": (None, FAST)}
    assert placed(look(slow_is_free=True), measured(), a=once) == {"a": ("slow", frozenset())}


def test_after_one_failure_it_goes_back_where_the_others_are_busy() -> None:
    once = History(failures=1, avoid=FAST)
    assert placed(look(slow_is_free=False), a=once) == {"a": (None, frozenset())}
    assert placed(look(slow_is_free=False), measured(), a=once) == {"a": ("fast", frozenset())}


def test_after_two_failures_it_waits_for_the_others_and_who_is_behind_it_goes_ahead() -> None:
    twice = History(failures=2, avoid=FAST)
    assert placed(look(slow_is_free=False), a=twice, b=History()) == {"b": (None, frozenset())}
    assert placed(look(slow_is_free=False), measured(), a=twice, b=History()) == {"b": ("fast", frozenset())}
    assert placed(Snapshot([make_node("fast")]), a=twice) == {"a": (None, frozenset())}, "there is no other"
