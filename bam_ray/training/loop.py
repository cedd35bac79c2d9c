"""The training loop: which sequences, at which rate, with which checkpoints. The engine does the steps.

What is computed depends on the settings alone: the global batch and its order come from the sampler, every rank takes
its share of rows, and random numbers are seeded by step, so a run that was stopped and resumed anywhere gives the
losses of one that was not.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bam_ray.errors import Interrupted, SettingsError
from bam_ray.settings import TrainingSettings
from bam_ray.training.checkpoints import Checkpoints
from bam_ray.training.engine import Engine
from bam_ray.training.schedule import learning_rate


class Sampler(Protocol):
    """Sequences in one global order, resumable."""

    def take(self, count: int) -> np.ndarray:
        """The next `count` sequences: int64 [count, L]."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, as plain JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
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


def train(
    engine: Engine,
    sampler: Sampler,
    sequence_length: int,
    settings: TrainingSettings,
    checkpoints: Checkpoints,
    report: Callable[[Point], None],
    should_stop: Callable[[], bool],
) -> list[Point]:
    """Train to the last step and return the curve; called on every rank alike.

    Goes on from the newest checkpoint. Where `should_stop` says so, writes one and raises `Interrupted`.
    """
    sequences = settings.batch_tokens // sequence_length
    if sequences == 0 or sequences % engine.world_size:
        raise SettingsError(
            f"batch_tokens {settings.batch_tokens} is {sequences} sequences of {sequence_length}, which "
            f"{engine.world_size} processes cannot share alike: make it a multiple of "
            f"{sequence_length * engine.world_size}"
        )
    share = sequences // engine.world_size
    mine = slice(engine.rank * share, (engine.rank + 1) * share)
    curve: list[Point] = []
    step = 0
    found = checkpoints.latest()
    if found is not None:
        engine.load(found.folder)
        sampler.load_state_dict(found.trainer["sampler"])
        curve = [Point(**point) for point in found.trainer["curve"]]
        step = found.step

    def checkpoint() -> None:
        folder = Path(tempfile.mkdtemp(prefix="bam-step-"))
        engine.save(folder)
        if engine.rank > 0:
            folder.rmdir()
        else:
            points = [asdict(point) for point in curve]
            checkpoints.save(folder, step, {"step": step, "sampler": sampler.state_dict(), "curve": points})

    while step < settings.steps:
        started = time.perf_counter()
        torch.manual_seed((settings.seed << 32) + (step << 8) + engine.rank)  # dropout, should the model have any
        batch = torch.from_numpy(sampler.take(sequences)[mine])
        lr = learning_rate(settings, step)
        result = engine.step(batch, lr)
        step += 1
        speed = sequences * sequence_length / (time.perf_counter() - started)
        curve.append(
            Point(step, result.nll, result.load_balance, result.router_z, result.grad_norm, lr, round(speed, 1))
        )
        report(curve[-1])
        stop = engine.any_rank(should_stop())
        if step < settings.steps and (stop or step % settings.checkpoint_every == 0):
            checkpoint()
        if stop and step < settings.steps:
            checkpoints.wait()
            raise Interrupted(f"stopped at step {step} of {settings.steps}; the same command goes on from there")
    checkpoints.wait()
    return curve
