"""The metrics of one server in Prometheus' text format. Each replica has its own.

Metrics with the meaning of one of vLLM's have its name, so that dashboards and gateways for vLLM work. Metrics of our
own begin with `bam_`.
"""

import time
from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from bam_ray.adapters.pool import AdapterPool
from bam_ray.serving.engine import Delta
from bam_ray.serving.scheduler import Scheduler
from bam_ray.serving.served_adapters import AdapterUse

RequestOutcome = Literal["finished", "left", "refused", "failed"]
LABELS = ["model_name"]
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
REQUEST_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class RequestCounter:
    """The number of requests by outcome."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()  # one per server: a process may run several servers
        self._requests = Counter(
            "bam_requests",
            "Requests by outcome: finished, left (the client disconnected), refused (4xx), failed (5xx)",
            ["outcome"],
            registry=self._registry,
        )

    def count_request(self, outcome: RequestOutcome) -> None:
        """Count one request that ended."""
        self._requests.labels(outcome).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def samples(self) -> Iterator[Sample]:
        """Yield the values of all metrics, without the times at which they were created."""
        for metric in self._registry.collect():
            yield from (sample for sample in metric.samples if not sample.name.endswith("_created"))


class ServerMetrics(RequestCounter, Collector):
    """The state of the scheduler, read at each scrape, and what became of the requests."""

    def __init__(self, scheduler: Scheduler, model_name: str, pool: AdapterPool | None = None) -> None:
        super().__init__()
        self._scheduler, self._model_name, self._pool = scheduler, model_name, pool
        registry = self._registry
        self._finished = Counter(
            "vllm:request_success",
            "Completions that ended, by finish reason",
            [*LABELS, "finished_reason"],
            registry=registry,
        )

        self._adapters = Counter(
            "bam_adapter_requests",
            "Requests of a server with adapters, by the reason of the choice and the place of the adapter",
            ["reason", "tier"],
            registry=registry,
        )

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=registry).labels(model_name)

        self.first_token = histogram(
            "time_to_first_token_seconds", "Time until the first output of a request", REQUEST_SECONDS
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds", "Time between two tokens of a completion", TOKEN_SECONDS
        )
        self.whole_request = histogram(
            "e2e_request_latency_seconds", "Time of a request that finished", REQUEST_SECONDS
        )
        registry.register(self)

    def count_adapter(self, use: AdapterUse) -> None:
        """Count one request of a server with adapters."""
        self._adapters.labels(use.reason, use.tier or "none").inc()

    def count_completion(self, reason: str) -> None:
        """Count one completion that ended."""
        self._finished.labels(self._model_name, reason).inc()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the scheduler and the engine."""
        scheduler, engine, totals = self._scheduler, self._scheduler.engine, self._scheduler.totals
        prefixes, used = engine.prefixes, engine.memory.used / engine.memory.size
        for gauge, text, number in (
            ("num_requests_running", "Completions that are being computed", scheduler.active),
            ("num_requests_waiting", "Prompts that wait for a slot", scheduler.waiting),
            ("kv_cache_usage_perc", "Share of the memory of keys and values that is reserved, 0 to 1", used),
        ):
            family = GaugeMetricFamily(f"vllm:{gauge}", text, labels=LABELS)
            family.add_metric([self._model_name], number)
            yield family
        for counter, text, number in (
            ("prompt_tokens", "Tokens of prompts that were started", totals.prompt_tokens),
            ("generation_tokens", "Tokens that were generated", totals.completion_tokens),
            ("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache", prefixes.queries),
            ("prefix_cache_hits", "Tokens of prompts that were found in the prefix cache", prefixes.hits),
        ):
            counted = CounterMetricFamily(f"vllm:{counter}", text, labels=LABELS)
            counted.add_metric([self._model_name], number)
            yield counted
        yield CounterMetricFamily("bam_steps", "Steps of the decode engine", value=totals.steps)
        yield CounterMetricFamily("bam_step_seconds", "Seconds spent in the decode engine", value=totals.step_seconds)
        yield GaugeMetricFamily("bam_slots", "Slots: requests that can be decoded together", engine.slots)
        if self._pool is not None:
            text = "Requests that wait for an adapter or for its slot"
            yield GaugeMetricFamily("bam_adapter_requests_waiting", text, self._pool.waiting)


class RequestTimer:
    """The times of one request, from its arrival at the scheduler."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._start = time.monotonic()
        self._last: dict[int, float] = {}  # time of the last output of each completion

    def add(self, batch: list[tuple[int, Delta]]) -> None:
        """Observe the output of one or more steps. The tokens of one output share its time equally."""
        now = time.monotonic()
        if not self._last:
            self._metrics.first_token.observe(now - self._start)
        for index, delta in batch:
            if index in self._last and delta.tokens:
                self._metrics.between_tokens.observe((now - self._last[index]) / len(delta.tokens))
            self._last[index] = now
            if delta.finish_reason is not None:
                self._metrics.count_completion(delta.finish_reason)

    def finish(self) -> None:
        """Observe the end of a request that finished."""
        self._metrics.whole_request.observe(time.monotonic() - self._start)
