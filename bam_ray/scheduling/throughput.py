"""What has been measured: tokens a second by kind of node, and seconds that a start and a last checkpoint take.

Every attempt at a task is measured from its first step on, by the controller's clock, so that waiting for data and for
uploads counts. Attempts at tasks of one model, with one demand, on nodes of one kind, are taken together: their median
is what such a task will do on such a node.
"""

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

DEFAULT_COST = 30.0  # seconds, until a start has been seen
LATEST = 32  # starts and checkpoints that are remembered

Group = tuple[str, str]  # model, demand


class Speeds:
    """Measured speeds and costs, by group of tasks."""

    def __init__(self) -> None:
        self._rates: dict[tuple[Group, str], dict[str, float]] = defaultdict(dict)
        self._medians: dict[tuple[Group, str], float] = {}
        self._starts: dict[Group, list[float]] = defaultdict(list)
        self._checkpoints: dict[Group, list[float]] = defaultdict(list)

    def saw(self, group: Group, kind: str, task_id: str, rate: float) -> None:
        """The mean speed of an attempt at `task_id` so far: tokens a second."""
        self._rates[group, kind][task_id] = rate
        self._medians.pop((group, kind), None)

    def saw_start(self, group: Group, seconds: float) -> None:
        """From being placed on a node to the first new step."""
        self._starts[group] = [*self._starts[group], seconds][-LATEST:]

    def saw_checkpoint(self, group: Group, seconds: float) -> None:
        """From being asked to stop to having stopped, with a checkpoint written."""
        self._checkpoints[group] = [*self._checkpoints[group], seconds][-LATEST:]

    def measured(self, group: Group, kind: str) -> float | None:
        """Tokens a second of such a task on a node of `kind`; None where none was measured there."""
        key = group, kind
        if key not in self._medians:
            rates = self._rates.get(key)
            if not rates:
                return None
            self._medians[key] = median(rates.values())
        return self._medians[key]

    def expected(self, group: Group, kinds: Iterable[str]) -> dict[str, float]:
        """The same for all `kinds`, empty where none was measured.

        A kind that was not is taken to be as fast as the fastest: it will be tried, and then it is known.
        """
        measured = {kind: self.measured(group, kind) for kind in kinds}
        known = [rate for rate in measured.values() if rate]
        if not known:
            return {}
        return {kind: rate or max(known) for kind, rate in measured.items()}

    def seen(self, group: Group) -> tuple[float, float]:
        """Seconds of a start and of a last checkpoint, until one of them was seen as long as the other."""
        starts, checkpoints = self._starts.get(group), self._checkpoints.get(group)
        start = median(starts) if starts else DEFAULT_COST
        return start, median(checkpoints) if checkpoints else start

    def cost(self, group: Group) -> float:
        """Seconds of training that it costs a task to move to another node."""
        return sum(self.seen(group))
