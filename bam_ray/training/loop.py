"""The training loop: it chooses sequences, learning rate and checkpoints, and the engine does the steps.

The result depends only on the settings. The sampler determines the global batches and their order, every rank takes its
share of the rows, and random numbers are seeded by step. A run that is stopped and resumed at any step therefore gives
the losses of an uninterrupted run.

A loss that is not finite can be a hardware fault. Unless the settings say otherwise, the loop rolls back to the last
checkpoint once, and fails if the same loss occurs again. A fault of the data, like most spikes, would occur again: the
batch is skipped, or the loop rolls back and continues with the data after it. A spike is defined relative to the curve
so far, which checkpoints store.
"""

import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from bam_ray.errors import CheckpointError, Interrupted, LossNotFinite, LossSpiked, SettingsError, TrainingError
from bam_ray.settings import TrainingSettings
from bam_ray.training.checkpoints import Checkpoints, FoundCheckpoint
from bam_ray.training.engine import NO_LIMITS, Engine, LossLimits, StepResult
from bam_ray.training.events import BatchSkipped, Event, MicroBatchHalved, RolledBack, SegmentStarted
from bam_ray.training.listener import StepMetrics, TrainingListener
from bam_ray.training.schedule import learning_rate

MAX_BAD_LOSSES = 10  # consecutive spikes, or losses that are not finite, before training fails


class Sampler(Protocol):
    """Sequences in one global order, from which training can resume at any position."""

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the next `count` sequences, int64 [count, L], and their domains, int64 [count, D] (`Engine.step`)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a position that `state_dict` returned."""
        ...


@runtime_checkable
class AdaptiveSampler(Sampler, Protocol):
    """A sampler that depends on the model."""

    def adapt(self, step: int, engine: Engine) -> Event | None:
        """Adapt to the model of `engine` after `step`; returns an event if anything changed.

        All ranks call this between a step and its checkpoint.
        """
        ...


@dataclass(frozen=True)
class ComputeSegment:
    """A part of a run, and how it was computed from `step` on.

    Segments are ordered by time, not by step: after a rollback one can start before the last step of the previous one.
    """

    step: int
    device: str
    precision: str
    micro_batch: int | None
    processes: int


@dataclass(frozen=True)
class FinishedTraining:
    """The record of a training that has reached its last step, which is stored with the artifact."""

    curve: list[StepMetrics]
    segments: list[ComputeSegment]
    refused: list[str]  # errors of damaged checkpoints, in all attempts
    device_seconds: float  # duration of all steps, summed over the processes that computed each step


def random_seed(*numbers: int) -> int:
    """Return a 64-bit seed derived from `numbers`; different numbers give different seeds."""
    return int(np.random.SeedSequence([number % (1 << 64) for number in numbers]).generate_state(1, np.uint64)[0])


class Training:
    """One run of the training loop. Every rank has one."""

    def __init__(
        self,
        engine: Engine,
        sampler: Sampler,
        sequence_length: int,
        settings: TrainingSettings,
        checkpoints: Checkpoints,
        listener: TrainingListener,
    ) -> None:
        self._sequences = settings.batch_tokens // sequence_length
        if self._sequences == 0 or self._sequences % engine.world_size:
            raise SettingsError(
                f"batch_tokens {settings.batch_tokens} is {self._sequences} sequences of {sequence_length}, which "
                f"{engine.world_size} processes cannot divide evenly: make it a multiple of "
                f"{sequence_length * engine.world_size}"
            )
        # A strided slice: sequences that are processed in the same micro step are then adjacent in the global batch at
        # any world size
        self._mine = slice(engine.rank, None, engine.world_size)
        self._engine, self._sampler, self._settings = engine, sampler, settings
        self._tokens = self._sequences * sequence_length
        self._checkpoints, self._listener = checkpoints, listener
        checkpoints.share_lease(engine.gather)
        self.step = 0
        self.curve: list[StepMetrics] = []
        self.segments: list[ComputeSegment] = []
        self.refused: list[str] = []  # errors of damaged checkpoints, in all attempts so far
        self._model_changed_at = 0  # the step at which the model last got experts: losses before it do not compare
        self._checkpoint_seconds = 0.0  # since the last step
        self._bad_losses: Counter[type[TrainingError]] = Counter()  # consecutive ones, by kind
        self._bad_loss_step = 0  # the largest step of these

    def resume(self) -> None:
        """Load the newest checkpoint; if there is none, write one, so that a rollback is possible from the start."""
        if not self._load_latest_checkpoint():
            self.save_checkpoint()

    def run(self) -> FinishedTraining:
        """Train to the last step.

        Raises:
            Interrupted: If the listener asked to stop; a checkpoint has been written.
            LossNotFinite: As the settings say.
            LossSpiked: As the settings say.
        """
        self._listener.on_training_start(self.step)
        try:
            while self.step < self._settings.steps:
                self._checkpoints.settle()
                try:
                    self.train_step()
                except (LossNotFinite, LossSpiked) as error:
                    self.handle_bad_loss(error)
                    continue
                self._finish_step()
            self._checkpoints.wait()
            if self._checkpoints.in_parts:  # all ranks must have seen the last commit before rank 0 deletes checkpoints
                self._engine.any_rank(False)
        finally:
            self._listener.on_training_end()
        return FinishedTraining(self.curve, self.segments, self.refused, self.device_seconds())

    def device_seconds(self) -> float:
        """Return the duration of all steps of the curve, summed over the processes that computed each step."""
        total = 0.0
        for point in self.curve:
            segment = next(segment for segment in reversed(self.segments) if segment.step <= point.step)
            total += segment.processes * self._tokens / point.tokens_per_second
        return total

    def train_step(self) -> None:
        """Do one step. If it raises, nothing but the sampler has changed."""
        started = time.perf_counter()
        engine, settings = self._engine, self._settings
        torch.manual_seed(random_seed(settings.seed, self.step, engine.rank))  # for dropout and noisy gates
        batch, domains = (torch.from_numpy(each[self._mine]) for each in self._sampler.take(self._sequences))
        data_ready = time.perf_counter()
        lr = learning_rate(settings, self.step)
        result = engine.step(batch, lr, self._limits(), domains)
        self.step += 1
        done = time.perf_counter()
        speed = round(self._tokens / (done - started), 1)
        metrics = StepMetrics(self.step, result.nll, result.load_balance, result.router_z, result.grad_norm, lr, speed)
        self.curve.append(metrics)
        self._record_segment()
        self._listener.on_step(metrics, result, self._durations(data_ready - started, done - data_ready, result))

    def _durations(self, data: float, compute: float, result: StepResult) -> dict[str, float]:
        """Return the seconds of the step's parts, and start to count the time for checkpoints again."""
        seconds = {"data": data, "compute": compute, "checkpoint": self._checkpoint_seconds}
        self._checkpoint_seconds = 0.0
        if result.exchange_seconds is not None:
            seconds |= {"all_to_all": result.exchange_seconds, "compute": compute - result.exchange_seconds}
        return seconds

    def _finish_step(self) -> None:
        """Adapt the sampler, write a checkpoint if it is due, and stop if the listener asks for it."""
        settings = self._settings
        if self.step >= self._bad_loss_step:
            self._bad_losses.clear()
        last = self.step >= settings.steps
        if not last and isinstance(self._sampler, AdaptiveSampler):
            event = self._sampler.adapt(self.step, self._engine)
            if event is not None:
                self._listener.emit(event)
        stop = self._engine.any_rank(self._listener.should_stop())
        if last:
            return
        if stop or self.step % settings.checkpoint_every == 0:
            self.save_checkpoint()
        if stop:
            self._checkpoints.wait()
            raise Interrupted(f"stopped at step {self.step} of {settings.steps}: run the same command to resume")

    def _record_segment(self) -> None:
        """Record how the last step was computed, unless the step before was computed in the same way."""
        engine = self._engine
        segment = ComputeSegment(self.step, engine.device_name, engine.precision, engine.micro_batch, engine.world_size)
        last = self.segments[-1] if self.segments else None
        if last is not None and replace(last, step=self.step) == segment:
            return
        self.segments.append(segment)
        if last is not None and replace(last, step=self.step, micro_batch=segment.micro_batch) == segment:
            self._listener.emit(MicroBatchHalved(self.step, segment.micro_batch, last.micro_batch))
        else:
            self._listener.emit(SegmentStarted(**asdict(segment)))

    def _limits(self) -> LossLimits:
        """Return the limits above which the next step is a spike."""
        spike = self._settings.spike
        last = [point for point in self.curve[-spike.window :] if point.step > self._model_changed_at]
        if self._settings.on_spike == "ignore" or len(last) < spike.window:
            return NO_LIMITS
        return LossLimits(
            nll=spike.loss * statistics.median(point.nll for point in last),
            grad_norm=spike.grad_norm * statistics.median(point.grad_norm for point in last),
        )

    def handle_bad_loss(self, error: LossNotFinite | LossSpiked) -> None:
        """Skip the batch of the next step, roll back or raise, as the settings say."""
        settings, kind = self._settings, type(error)
        spiked = isinstance(error, LossSpiked)
        action = settings.on_spike if spiked else settings.on_not_finite
        hint = "on_spike and spike to tolerate it" if spiked else "on_not_finite to skip its data"
        self._bad_loss_step = max(self._bad_loss_step, self.step + 1)
        self._bad_losses[kind] += 1
        if self._bad_losses[kind] > {"stop": 0, "retry": 1}.get(action, MAX_BAD_LOSSES):
            raise kind(
                f"step {self.step + 1}: {error} ({self._bad_losses[kind]} in a row): lower peak_lr, check the data, or "
                f"set {hint}"
            ) from None
        if action == "skip":
            self._listener.emit(BatchSkipped(self.step + 1, str(error)))
            return
        position_after_batch = self._sampler.state_dict()
        self._rollback(error)
        if action == "roll_back":
            self._sampler.load_state_dict(position_after_batch)

    def _rollback(self, error: TrainingError) -> None:
        """Load the newest checkpoint, the same one on all ranks."""
        failed_step = self.step + 1
        self._checkpoints.wait()
        if not self._load_latest_checkpoint():
            raise CheckpointError(
                f"step {failed_step}: {error}, and there is no intact checkpoint to roll back to: check the store"
            )
        self._listener.emit(RolledBack(failed_step, self.step, str(error)))

    def _load_latest_checkpoint(self) -> bool:
        """Load the newest checkpoint that all ranks can read; returns False if there is none."""
        found = self._checkpoints.latest(self._engine.gather)
        self.refused += [checkpoint.error for checkpoint in self._checkpoints.refused]
        self._checkpoints.refused.clear()
        if found is None:
            return False
        self._restore(found)
        self._listener.on_checkpoint_loaded(self.step)
        return True

    def _restore(self, found: FoundCheckpoint) -> None:
        """Set the engine, the sampler, the listener and this loop to the state of a checkpoint."""
        trainer = found.trainer
        self._engine.load(found.folder)
        self._sampler.load_state_dict(trainer["sampler"])
        self._listener.load_state_dict(trainer.get("watch", {}))
        self.curve = [StepMetrics(**point) for point in trainer["curve"]]
        self.segments = [ComputeSegment(**segment) for segment in trainer["legs"]]
        self._model_changed_at = trainer.get("changed", 0)
        self.refused = list(dict.fromkeys([*trainer["refused"], *self.refused]))
        self.step = found.step

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step in the background. All ranks call this."""
        started = time.perf_counter()
        state = self._engine.state()
        if state is not None:
            trainer = {
                "step": self.step,
                "sampler": self._sampler.state_dict(),
                "curve": list(self.curve),
                "legs": list(self.segments),
                "refused": list(self.refused),
                "changed": self._model_changed_at,
            }
            listener_state = self._listener.state_dict()
            if listener_state is not None:
                trainer["watch"] = listener_state
            self._checkpoints.save(state, trainer)
        self._checkpoint_seconds += time.perf_counter() - started
