"""The progress of a task as gauges of Ray's Prometheus endpoint (`ray_bam_*`), which every node serves."""

from ray.util.metrics import Gauge

from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.pipeline.tasks import Progress

GAUGES = {  # field of `Progress`: name and description of its gauge
    "step": ("bam_step", "Optimizer steps done"),
    "total_steps": ("bam_total_steps", "Optimizer steps in total"),
    "loss": ("bam_loss_nll", "NLL in nats per token, without auxiliary losses"),
    "tokens_per_second": ("bam_tokens_per_second", "Training throughput"),
    "load_imbalance": ("bam_load_imbalance", "Largest over mean share of an expert's load, in the worst layer"),
    "dead_experts": ("bam_dead_experts", "Experts of all layers that are hardly ever chosen"),
    "checkpoint_step": ("bam_checkpoint_step", "Step of the last committed checkpoint"),
}


class Gauges:
    """The gauges of the task `kind/name`."""

    def __init__(self, kind: ArtifactKind, name: str) -> None:
        self._tags = {"kind": kind, "name": name}
        self._curve = Gauge("bam_curve", "Last value of a training curve", tag_keys=("kind", "name", "curve"))
        self._gauges = {
            field: Gauge(metric, description, tag_keys=("kind", "name"))
            for field, (metric, description) in GAUGES.items()
        }

    def update(self, progress: Progress | None) -> None:
        """Set the gauges to the values that the task last reported."""
        for field, gauge in self._gauges.items():
            value = getattr(progress, field, None)
            if value is not None:
                gauge.set(value, tags=self._tags)
        for curve, value in (progress.curves if progress else {}).items():
            self._curve.set(value, tags={**self._tags, "curve": curve})
