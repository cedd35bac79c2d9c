"""Counts of one server in Prometheus' text format. Behind several replicas each answers for itself."""

from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bam_ray.serving.scheduler import Scheduler

Outcome = Literal["finished", "left", "refused", "failed"]


class Metrics(Collector):
    """The scheduler's state, read when asked, and the outcomes of requests."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._registry = CollectorRegistry()  # the server's own: a process may hold several
        self._outcomes = Counter(
            "bam_requests",
            "Requests by outcome: finished, left (the client went away), refused (4xx), failed (5xx)",
            ["outcome"],
            registry=self._registry,
        )
        self._registry.register(self)

    def count(self, outcome: Outcome) -> None:
        """One request ended."""
        self._outcomes.labels(outcome).inc()

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        scheduler = self._scheduler
        tokens = CounterMetricFamily("bam_tokens", "Tokens computed", labels=["kind"])
        tokens.add_metric(["prompt"], scheduler.totals.prompt_tokens)
        tokens.add_metric(["completion"], scheduler.totals.completion_tokens)
        yield tokens
        yield CounterMetricFamily("bam_steps", "Steps of the engine", value=scheduler.totals.steps)
        yield CounterMetricFamily("bam_step_seconds", "Time in the engine", value=scheduler.totals.step_seconds)
        yield GaugeMetricFamily("bam_slots", "Requests that can be decoded together", value=scheduler.engine.slots)
        yield GaugeMetricFamily("bam_active_slots", "Requests being decoded", value=scheduler.active)
        yield GaugeMetricFamily("bam_waiting_requests", "Requests that wait for a slot", value=scheduler.waiting)
