"""The training loop: which sequences, at which rate, with which checkpoints. The engine does the steps.

What is computed depends on the settings alone: the global batch and its order come from the sampler, every rank takes
its share of rows, and random numbers are seeded by step, so a run that was stopped and resumed anywhere gives the
losses of one that was not.

A loss that is not finite may be the hardware's fault: unless the settings say otherwise, the loop goes back to the last
checkpoint once, and gives up where it comes again. What the data does, as most spikes, would come again: the batch is
left out, or going back, the loop goes on with the data after it. What is a spike follows from the curve so far, which
checkpoints hold.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from bam_ray.errors import CheckpointError, Interrupted, LossNotFinite, LossSpiked, SettingsError, TrainingError
from bam_ray.settings import TrainingSettings
from bam_ray.training.checkpoints import Checkpoints, Tell
from bam_ray.training.engine import NO_LIMITS, Engine, Limits
from bam_ray.training.schedule import learning_rate

MOST_IN_A_ROW = 10  # spikes, or losses that are not finite, before training is given up


class Remembered(Protocol):
    """What checkpoints remember."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


class Sampler(Remembered, Protocol):
    """Sequences in one global order, resumable."""

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` sequences, int64 [count, L], and their domains, int64 [count, D] (`Engine.step`)."""
        ...


@dataclass(frozen=True)
class Point:
    """One step of a training curve."""

    step: int
    nll: float
    load_balance: float
    router_z: float
    grad_norm: float
    lr: float
    tokens_per_second: float


@dataclass(frozen=True)
class Leg:
    """A part of a run: from which step on it was computed where and how. Legs follow one another in time, not in steps:
    one may begin before the last step of the leg before."""

    step: int
    device: str
    precision: str
    micro_batch: int | None
    processes: int


def random_seed(*numbers: int) -> int:
    """One of 64 bits, another for all other `numbers`."""
    return int(np.random.SeedSequence([number % (1 << 64) for number in numbers]).generate_state(1, np.uint64)[0])


class Training:
    """One run of the loop, on every rank alike."""

    def __init__(
        self,
        engine: Engine,
        sampler: Sampler,
        sequence_length: int,
        settings: TrainingSettings,
        checkpoints: Checkpoints,
        report: Callable[[Point], None],
        tell: Tell,
        should_stop: Callable[[], bool],
        after_step: Callable[[int], None] = lambda step: None,
        watch: Remembered | None = None,
    ) -> None:
        """`after_step` is called on all ranks between a step and its checkpoint, but for the last step; `watch`, on the
        rank that writes checkpoints, is what else they remember."""
        self._sequences = settings.batch_tokens // sequence_length
        if self._sequences == 0 or self._sequences % engine.world_size:
            raise SettingsError(
                f"batch_tokens {settings.batch_tokens} is {self._sequences} sequences of {sequence_length}, which "
                f"{engine.world_size} processes cannot share alike: make it a multiple of "
                f"{sequence_length * engine.world_size}"
            )
        # Every so manieth: what ranks compute at once are then neighbours in the batch, however many ranks there are
        self._mine = slice(engine.rank, None, engine.world_size)
        self._engine, self._sampler, self._settings = engine, sampler, settings
        self._tokens = self._sequences * sequence_length
        self._checkpoints, self._report, self._tell, self._should_stop = checkpoints, report, tell, should_stop
        self._after_step, self._watch = after_step, watch
        self.step = 0
        self.curve: list[Point] = []
        self.legs: list[Leg] = []
        self.refused: list[str] = []  # damaged checkpoints of all attempts so far
        self.times: dict[str, float] = {}  # seconds of the last step, by what they went into
        self._changed = 0  # the step at which the model last got experts: losses before it are another model's
        self._checkpointing = 0.0  # seconds since the last step
        self._met: Counter[type[TrainingError]] = Counter()  # bad losses one after the other, by kind
        self._met_at = 0  # their furthest step

    def resume(self) -> None:
        """Go on from the newest checkpoint, where there is one; else write one, to have something to go back to."""
        if not self._take_up_newest():
            self._checkpoint()

    def run(self) -> list[Point]:
        """Train to the last step and return the curve. Where `should_stop` says so, write a checkpoint and raise
        `Interrupted`; raises `LossNotFinite` and `LossSpiked` as the settings say."""
        settings, checkpoints = self._settings, self._checkpoints
        while self.step < settings.steps:
            checkpoints.settle()
            try:
                self._advance()
            except (LossNotFinite, LossSpiked) as error:
                self._meet(error)
                continue
            if self.step >= self._met_at:
                self._met.clear()
            if self.step < settings.steps:
                self._after_step(self.step)
            stop = self._engine.any_rank(self._should_stop())
            if self.step < settings.steps and (stop or self.step % settings.checkpoint_every == 0):
                self._checkpoint()
            if stop and self.step < settings.steps:
                checkpoints.wait()
                raise Interrupted(
                    f"stopped at step {self.step} of {settings.steps}; the same command goes on from there"
                )
        checkpoints.wait()
        return self.curve

    def device_seconds(self) -> float:
        """Seconds that the steps of the curve took, summed over the processes that computed each."""
        total = 0.0
        for point in self.curve:
            leg = next(leg for leg in reversed(self.legs) if leg.step <= point.step)
            total += leg.processes * self._tokens / point.tokens_per_second
        return total

    def _advance(self) -> None:
        """One step; nothing has changed, but for the sampler, where it raises."""
        started = time.perf_counter()
        engine, settings = self._engine, self._settings
        torch.manual_seed(random_seed(settings.seed, self.step, engine.rank))  # dropout and noisy gates
        batch, domains = (torch.from_numpy(each[self._mine]) for each in self._sampler.take(self._sequences))
        taken = time.perf_counter()
        lr = learning_rate(settings, self.step)
        result = engine.step(batch, lr, self._limits(), domains)
        self.step += 1
        done = time.perf_counter()
        self.times = {"data": taken - started, "compute": done - taken, "checkpoint": self._checkpointing}
        if engine.last_exchange is not None:
            self.times |= {"all_to_all": engine.last_exchange, "compute": done - taken - engine.last_exchange}
        self._checkpointing = 0.0
        speed = self._tokens / (done - started)
        self.curve.append(
            Point(self.step, result.nll, result.load_balance, result.router_z, result.grad_norm, lr, round(speed, 1))
        )
        self._note_leg(self.step)
        self._report(self.curve[-1])

    def _note_leg(self, step: int) -> None:
        """Write down where and how `step` was computed, unless as the one before."""
        engine = self._engine
        leg = Leg(step, engine.device_name, engine.precision, engine.micro_batch, engine.world_size)
        last = self.legs[-1] if self.legs else None
        if last is not None and replace(last, step=step) == leg:
            return
        self.legs.append(leg)
        if last is not None and replace(last, step=step, micro_batch=leg.micro_batch) == leg:
            self._tell("micro_batch", step=step, sequences=leg.micro_batch, before=last.micro_batch)
        else:
            self._tell("computing", **asdict(leg))

    def _limits(self) -> Limits:
        """Above which the next step is a spike."""
        spike = self._settings.spike
        last = [point for point in self.curve[-spike.window :] if point.step > self._changed]
        if self._settings.on_spike == "ignore" or len(last) < spike.window:
            return NO_LIMITS
        return Limits(
            nll=spike.loss * statistics.median(point.nll for point in last),
            grad_norm=spike.grad_norm * statistics.median(point.grad_norm for point in last),
        )

    def _meet(self, error: LossNotFinite | LossSpiked) -> None:
        """Do what the settings say about a bad loss at the next step."""
        settings, kind = self._settings, type(error)
        spiked = isinstance(error, LossSpiked)
        action = settings.on_spike if spiked else settings.on_not_finite
        hint = "on_spike and spike to bear it" if spiked else "on_not_finite to leave its data out"
        self._met_at = max(self._met_at, self.step + 1)
        self._met[kind] += 1
        if self._met[kind] > {"stop": 0, "retry": 1}.get(action, MOST_IN_A_ROW):
            raise kind(
                f"step {self.step + 1}: {error} ({self._met[kind]} in a row): lower peak_lr, look at the data, or "
                f"set {hint}"
            ) from None
        if action == "skip":
            self._tell("skipped", step=self.step + 1, error=str(error))
            return
        after = self._sampler.state_dict()
        self._go_back(error)
        if action == "roll_back":
            self._sampler.load_state_dict(after)

    def _go_back(self, error: TrainingError) -> None:
        """To the newest checkpoint, all ranks to the same."""
        came_from = self.step + 1
        self._checkpoints.wait()
        if not self._take_up_newest():
            raise CheckpointError(f"step {came_from}: {error}, and there is no whole checkpoint to go back to")
        self._tell("rolled_back", step=came_from, to=self.step, error=str(error))

    def _take_up_newest(self) -> bool:
        found = self._checkpoints.latest(self._engine.gather)
        self.refused += self._checkpoints.refused
        self._checkpoints.refused.clear()
        if found is None:
            return False
        self._engine.load(found.folder)
        self._sampler.load_state_dict(found.trainer["sampler"])
        if self._watch is not None:
            self._watch.load_state_dict(found.trainer.get("watch", {}))
        self.curve = [Point(**point) for point in found.trainer["curve"]]
        self.legs = [Leg(**leg) for leg in found.trainer["legs"]]
        self._changed = found.trainer.get("changed", 0)
        self.refused = list(dict.fromkeys([*found.trainer["refused"], *self.refused]))
        self.step = found.step
        return True

    def _checkpoint(self) -> None:
        started = time.perf_counter()
        state = self._engine.state()
        if state is not None:
            trainer = {
                "step": self.step,
                "sampler": self._sampler.state_dict(),
                "curve": list(self.curve),
                "legs": list(self.legs),
                "refused": list(self.refused),
                "changed": self._changed,
            }
            if self._watch is not None:
                trainer["watch"] = self._watch.state_dict()
            self._checkpoints.save(state, trainer)
        self._checkpointing += time.perf_counter() - started
