"""The metrics of one server in Prometheus' text format. Each replica reports its own."""

from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bam_ray.serving.scheduler import Scheduler

RequestOutcome = Literal["finished", "left", "refused", "failed"]


class ServerMetrics(Collector):
    """The state of the scheduler, read at each scrape, and the number of requests by outcome."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._registry = CollectorRegistry()  # one per server: a process may run several servers
        self._requests = Counter(
            "bam_requests",
            "Requests by outcome: finished, left (the client disconnected), refused (4xx), failed (5xx)",
            ["outcome"],
            registry=self._registry,
        )
        self._registry.register(self)

    def count_request(self, outcome: RequestOutcome) -> None:
        """Count one request that ended."""
        self._requests.labels(outcome).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the scheduler and the engine."""
        scheduler = self._scheduler
        totals = scheduler.totals
        tokens = CounterMetricFamily("bam_tokens", "Tokens computed", labels=["kind"])
        tokens.add_metric(["prompt"], totals.prompt_tokens)
        tokens.add_metric(["completion"], totals.completion_tokens)
        yield tokens
        yield CounterMetricFamily("bam_steps", "Steps of the decode engine", value=totals.steps)
        yield CounterMetricFamily("bam_step_seconds", "Seconds spent in the decode engine", value=totals.step_seconds)
        yield GaugeMetricFamily("bam_slots", "Slots: requests that can be decoded together", scheduler.engine.slots)
        yield GaugeMetricFamily("bam_active_slots", "Slots in use: requests being decoded", scheduler.active)
        yield GaugeMetricFamily("bam_waiting_requests", "Requests that wait for a slot", scheduler.waiting)
