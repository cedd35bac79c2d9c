"""Measured throughput: tokens per second on each kind of node, and the seconds that starts and checkpoints take.

Every attempt is measured from its first step, by the controller's clock, so that waiting for data and uploads counts.
Attempts at tasks of one throughput group (equal models and resource requests) on nodes of one kind are pooled. Their
median predicts the speed of such a task on such a node.
"""

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

DEFAULT_SECONDS = 30.0  # assumed for a start until one has been measured
MAX_SAMPLES = 32  # number of the most recent starts and checkpoints that the medians use

ThroughputGroup = tuple[str, str]  # model, description of the resource request


class ThroughputTracker:
    """Measured speeds and costs of each throughput group."""

    def __init__(self) -> None:
        self._rates: dict[tuple[ThroughputGroup, str], dict[str, float]] = defaultdict(dict)
        self._medians: dict[tuple[ThroughputGroup, str], float] = {}
        self._starts: dict[ThroughputGroup, list[float]] = defaultdict(list)
        self._checkpoints: dict[ThroughputGroup, list[float]] = defaultdict(list)

    def record_rate(self, group: ThroughputGroup, kind: str, task_id: str, rate: float) -> None:
        """Record the mean tokens per second of the current attempt at `task_id` on a node of `kind`."""
        self._rates[group, kind][task_id] = rate
        self._medians.pop((group, kind), None)

    def record_start(self, group: ThroughputGroup, seconds: float) -> None:
        """Record the time from the placement of a task to its first new step."""
        self._starts[group] = [*self._starts[group], seconds][-MAX_SAMPLES:]

    def record_checkpoint(self, group: ThroughputGroup, seconds: float) -> None:
        """Record the time from a drain request until the task has stopped with a checkpoint."""
        self._checkpoints[group] = [*self._checkpoints[group], seconds][-MAX_SAMPLES:]

    def rate(self, group: ThroughputGroup, kind: str) -> float | None:
        """Return the median tokens per second of the group on nodes of `kind`, or None if none was measured."""
        key = group, kind
        if key not in self._medians:
            rates = self._rates.get(key)
            if not rates:
                return None
            self._medians[key] = median(rates.values())
        return self._medians[key]

    def expected_rates(self, group: ThroughputGroup, kinds: Iterable[str]) -> dict[str, float]:
        """Return the expected tokens per second on each of `kinds`; empty if none of them was measured.

        An unmeasured kind is assumed to be as fast as the fastest measured kind. It is then tried, and so measured.
        """
        rates = {kind: self.rate(group, kind) for kind in kinds}
        measured = [rate for rate in rates.values() if rate]
        if not measured:
            return {}
        return {kind: rate or max(measured) for kind, rate in rates.items()}

    def start_and_checkpoint_seconds(self, group: ThroughputGroup) -> tuple[float, float]:
        """Return the median seconds of a start and of the checkpoint before a move.

        Until a checkpoint has been measured, it is assumed to take as long as a start.
        """
        starts, checkpoints = self._starts.get(group), self._checkpoints.get(group)
        start = median(starts) if starts else DEFAULT_SECONDS
        return start, median(checkpoints) if checkpoints else start

    def move_cost(self, group: ThroughputGroup) -> float:
        """Return the seconds of training that a task loses when it moves to another node."""
        return sum(self.start_and_checkpoint_seconds(group))
