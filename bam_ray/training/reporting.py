"""Reports on a training run while it runs: its curves, its events, and the progress in the run's status table."""

from collections.abc import Mapping, Sequence
from typing import Any

from bam_ray.pipeline.tasks import Progress, StageContext
from bam_ray.settings import MetricsSettings
from bam_ray.training.curves import CurveWriter
from bam_ray.training.engine import Engine, StepResult
from bam_ray.training.events import (
    BlendUpdated,
    BranchLeftOut,
    CheckpointCommitted,
    Emit,
    Event,
    ExpertUseChanged,
    Resumed,
    RolledBack,
)
from bam_ray.training.flops import peak_flops, training_flops
from bam_ray.training.listener import StepMetrics, TrainingListener
from bam_ray.training.objective import ExpertLoad, as_mixture
from bam_ray.training.router_metrics import RouterMetrics, RoutingReport
from bam_ray.units import GIB


class TrainingCurves:
    """All curves of a run, by name: their last values, and the files that they are written to."""

    def __init__(self, engine: Engine, settings: MetricsSettings, sequence_length: int, writer: CurveWriter) -> None:
        self.last: Mapping[str, float] = {}
        self._engine, self._sequence_length, self._writer = engine, sequence_length, writer
        self._peak_tflops = settings.peak_tflops

    def open(self, step: int) -> None:
        """Open the files; the curves continue after `step`."""
        self._writer.open(step)

    def add(self, step: int, scalars: Mapping[str, float], only_written: Mapping[str, float] | None = None) -> None:
        """Add values of `step`; `only_written` are too many to be kept in `last`."""
        self.last = {**self.last, **scalars}  # a new dict, because another thread reads the old one
        self._writer.write(step, {**scalars, **(only_written or {})})

    def of_step(self, metrics: StepMetrics, seconds: Mapping[str, float]) -> dict[str, float]:
        """Return the values of one step by the names of their curves."""
        scalars = {
            "loss/nll": metrics.nll,
            "grad_norm": metrics.grad_norm,
            "lr": metrics.lr,
            "throughput/tokens_per_second": metrics.tokens_per_second,
            "memory/peak_gib": self._engine.memory.peak_bytes() / GIB,
        }
        if metrics.load_balance or metrics.router_z:
            scalars |= {"loss/load_balance": metrics.load_balance, "loss/router_z": metrics.router_z}
        scalars |= {f"time/{part}": duration for part, duration in seconds.items()}
        peak = self._peak_tflops * 1e12 if self._peak_tflops else peak_flops(self._engine.device_name)
        if peak is not None:
            token_flops = training_flops(self._engine.model.config, self._sequence_length, 1)
            scalars["throughput/mfu"] = metrics.tokens_per_second * token_flops / (peak * self._engine.world_size)
        return scalars

    def flush(self) -> None:
        """Upload what has been written."""
        self._writer.flush()

    def roll_back(self, step: int) -> None:
        """Forget the values after `step`."""
        self._writer.roll_back(step)

    def close(self) -> None:
        """Upload and close the files."""
        self._writer.close()


class RunReporter(TrainingListener):
    """The listener that logs events, draws curves, and reports progress and notes to the context of the stage."""

    def __init__(
        self,
        engine: Engine,
        context: StageContext,
        log: Emit,
        curves: TrainingCurves,
        total_steps: int,
        router_metrics: RouterMetrics | None = None,
        earlier_events: Sequence[Event] = (),
    ) -> None:
        """Create the reporter of one attempt.

        Args:
            engine: The engine that trains.
            context: Receives the progress.
            log: Receives all events, besides this reporter.
            curves: The curves to draw.
            total_steps: The number of steps of the whole run.
            router_metrics: The router metrics of a mixture; None on ranks above 0 and for dense models.
            earlier_events: The events of this attempt from before the training, which are emitted when it starts.
        """
        self._context, self._log, self._curves, self._total_steps = context, log, curves, total_steps
        self._router_metrics, self._earlier_events = router_metrics, earlier_events
        left_out = [event for event in earlier_events if isinstance(event, BranchLeftOut)]
        self._left_out = tuple(event.branch for event in left_out)
        self._damaged = tuple(event.damaged for event in left_out if event.damaged is not None)
        mixture = as_mixture(engine.model)
        self._experts = tuple(mixture.config.expert_names or ()) if mixture is not None else ()
        self._step = 0  # the number of steps that are done
        self._committed_step: int | None = None
        self._metrics: StepMetrics | None = None
        self._routing: RoutingReport | None = None
        self._note = ""

    def emit(self, event: Event) -> None:
        """Log an event, apply it to the curves, and report its note if it has one."""
        self._log(event)
        match event:
            case CheckpointCommitted(step=step):
                self._committed_step = step
                self._curves.flush()
            case RolledBack(to=step):
                self._curves.roll_back(step)
            case BlendUpdated(step=step):
                self._curves.add(step, event.curves())
        note = event.note()
        if note is not None:
            self._note = note
            self._report_progress()

    def on_checkpoint_loaded(self, step: int) -> None:
        """See `TrainingListener`."""
        self._step = self._committed_step = step

    def on_training_start(self, step: int) -> None:
        """See `TrainingListener`."""
        for event in (Resumed(step), *self._earlier_events):
            self.emit(event)
        self._curves.open(step)

    def on_step(self, metrics: StepMetrics, result: StepResult, seconds: Mapping[str, float]) -> None:
        """See `TrainingListener`."""
        self._step, self._metrics = metrics.step, metrics
        scalars = self._curves.of_step(metrics, seconds)
        routing = self._routing_report(metrics.step, result.expert_load)
        if routing is None:
            self._curves.add(metrics.step, scalars)
        else:
            self._curves.add(metrics.step, scalars | routing.scalars, routing.by_domain_and_layer)
        self._report_progress()

    def on_training_end(self) -> None:
        """See `TrainingListener`."""
        self._curves.close()

    def should_stop(self) -> bool:
        """See `TrainingListener`."""
        return self._context.should_stop()

    def state_dict(self) -> dict[str, Any] | None:
        """See `TrainingListener`."""
        return self._router_metrics.state_dict() if self._router_metrics else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TrainingListener`."""
        if self._router_metrics:
            self._router_metrics.load_state_dict(state)

    def _routing_report(self, step: int, load: ExpertLoad | None) -> RoutingReport | None:
        """Add a step to the router metrics; returns the report if one is due."""
        if self._router_metrics is None or load is None:
            return None
        self._router_metrics.add(load)
        if not self._router_metrics.is_due(step):
            return None
        before, self._routing = self._routing, self._router_metrics.report()
        dead, overloaded = self._routing.dead, self._routing.overloaded
        if (dead, overloaded) != ((before.dead, before.overloaded) if before else ((), ())):
            self.emit(ExpertUseChanged.of(step, dead, overloaded))
        return self._routing

    def _report_progress(self) -> None:
        metrics, routing = self._metrics, self._routing
        self._context.report(
            Progress(
                step=self._step,
                total_steps=self._total_steps,
                loss=metrics.nll if metrics else None,
                tokens_per_second=metrics.tokens_per_second if metrics else None,
                checkpoint_step=self._committed_step,
                note=self._note,
                load_imbalance=routing.imbalance if routing else None,
                dead_experts=len(routing.dead) if routing else None,
                experts=self._experts,
                left_out=self._left_out,
                damaged=self._damaged,
                curves=self._curves.last,
            )
        )
