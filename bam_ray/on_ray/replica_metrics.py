"""The metrics of a replica in Ray's Prometheus endpoint, which every node serves.

A scrape of /metrics through Ray Serve reaches any of the replicas. Ray's endpoint has all of them, with the labels
`deployment`, `replica` and `application`. Names have the prefix `ray_`, and `_` instead of `:`, as those of
`ray.serve.llm`: `vllm:num_requests_running` is `ray_vllm_num_requests_running`.

Ray's counters and histograms take single events, but what a replica has are totals. All metrics are therefore exported
as gauges, also those that end in `_total`, `_bucket`, `_sum` and `_count`. Queries need no change, because `rate` and
`histogram_quantile` of Prometheus read the values and labels alone.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable

from prometheus_client.samples import Sample
from ray.serve.metrics import Gauge

EXPORT_SECONDS = 5.0

_logger = logging.getLogger(__name__)


class ReplicaGauges:
    """The metrics of this replica, which are exported every few seconds while the process lives."""

    def __init__(self, samples: Callable[[], Iterable[Sample]]) -> None:
        self._samples = samples
        self._gauges: dict[str, Gauge] = {}
        threading.Thread(target=self._export_forever, daemon=True, name="metrics").start()

    def export(self) -> None:
        """Set each gauge to its present value."""
        for sample in self._samples():
            name = sample.name.replace(":", "_")
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, "see docs/serving.md", tag_keys=tuple(sample.labels))
            self._gauges[name].set(sample.value, tags=dict(sample.labels))

    def _export_forever(self) -> None:
        while True:
            try:
                self.export()
            except Exception as error:  # of any type: the replica serves without metrics
                _logger.warning("metrics were not exported: %s", error)
            time.sleep(EXPORT_SECONDS)
