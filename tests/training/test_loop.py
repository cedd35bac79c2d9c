"""A run that was stopped, killed or damaged gives the losses of one that was not."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.leases import Lease
from bam_ray.errors import Interrupted, SettingsError, StaleLease, TrainingError
from bam_ray.model import BamConfig
from bam_ray.settings import TrainingSettings
from bam_ray.training.checkpoints import Checkpoints
from bam_ray.training.engine import TorchEngine
from bam_ray.training.loop import Point, train
from bam_ray.training.schedule import learning_rate

LENGTH = 16
SETTINGS = TrainingSettings(tokens=12 * 4 * LENGTH, batch_tokens=4 * LENGTH, peak_lr=1e-2, checkpoint_every=4)
BAM = BamConfig(**{**tiny.SIZES, "num_experts_per_tok": 2})


class Counting:
    """A sampler whose sequences are a function of its position."""

    position = 0

    def take(self, count: int) -> np.ndarray:
        rows = [np.random.default_rng(self.position + i).integers(2, 96, LENGTH) for i in range(count)]
        self.position += count
        return np.stack(rows)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def engine(config: Any = BAM, settings: TrainingSettings = SETTINGS) -> TorchEngine:
    torch.manual_seed(0)
    return TorchEngine(AutoModelForCausalLM.from_config(config), settings)


def run(
    store: MemoryStore,
    should_stop: Callable[[int], bool] = lambda step: False,
    settings: TrainingSettings = SETTINGS,
    config: Any = BAM,
) -> list[float]:
    """One attempt; the losses of the whole curve."""
    lease = Lease.take(store, "branches/x")
    points: list[Point] = []
    curve = train(
        engine(config, settings),
        Counting(),
        LENGTH,
        settings,
        Checkpoints(store, "branches", "x", lease),
        points.append,
        lambda: should_stop(points[-1].step),
    )
    return [point.nll for point in curve]


@pytest.mark.parametrize("config", [BAM, tiny.CONFIGS["cohere"]], ids=["mixture", "dense"])
def test_stopped_and_resumed_is_bitwise_the_unbroken_run(config: Any) -> None:
    unbroken = run(MemoryStore(), config=config)
    assert len(unbroken) == 12
    store = MemoryStore()
    with pytest.raises(Interrupted, match="step 6 of 12"):
        run(store, lambda step: step == 6, config=config)
    assert run(store, config=config) == unbroken


def test_killed_between_checkpoints_goes_on_from_the_last_one() -> None:
    unbroken = run(MemoryStore())
    store = MemoryStore()

    def die(step: int) -> bool:
        if step == 7:
            raise ZeroDivisionError  # as a kill: nothing is saved at step 7
        return False

    with pytest.raises(ZeroDivisionError):
        run(store, die)
    assert run(store) == unbroken


def test_a_damaged_checkpoint_is_passed_over_and_named() -> None:
    unbroken = run(MemoryStore())
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 9)
    newest = "branches/x/steps/0001-00000009/optimizer.safetensors"
    store.put(newest, store.get(newest)[:-1] + b"\xff")
    found = Checkpoints(store, "branches", "x", None).latest()
    assert found is not None
    assert found.step == 8
    assert "0001-00000009/optimizer.safetensors is not what its manifest says" in found.refused[0]
    assert run(store) == unbroken


def test_old_checkpoints_are_dropped() -> None:
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 10)
    steps = {key.split("/")[3] for key in store.list("branches/x/steps/")}
    assert steps == {"0001-00000008", "0001-00000010"}


def test_a_stale_attempt_cannot_commit() -> None:
    store = MemoryStore()
    old = Checkpoints(store, "branches", "x", Lease.take(store, "branches/x"))
    Lease.take(store, "branches/x")
    folder = Path(__file__).parent / "nowhere"  # never read: the lease is checked first
    old._pending = old._pool.submit(old._upload, folder, 1, old._lease)  # type: ignore[arg-type]
    with pytest.raises(StaleLease, match="attempt 2 took over"):
        old.wait()
    assert not list(store.list("branches/x/steps/"))


def test_the_micro_batch_does_not_change_a_dense_run() -> None:
    config = tiny.CONFIGS["cohere"]
    whole = run(MemoryStore(), config=config)
    halves = run(MemoryStore(), settings=SETTINGS.model_copy(update={"micro_batch_sequences": 1}), config=config)
    np.testing.assert_allclose(whole, halves, atol=1e-5)


def test_a_loss_that_is_not_finite_updates_nothing() -> None:
    broken = engine()
    with torch.no_grad():
        broken.model.model.norm.weight[0] = float("nan")
    before = broken.model.lm_head.weight.clone()
    with pytest.raises(TrainingError, match="not finite"):
        broken.step(tiny.tokens(4, LENGTH), 1e-2)
    assert torch.equal(broken.model.lm_head.weight, before)


def test_a_batch_that_is_no_whole_sequence_is_refused() -> None:
    with pytest.raises(SettingsError, match="cannot share alike"):
        run(MemoryStore(), settings=SETTINGS.model_copy(update={"batch_tokens": LENGTH - 1}))


def test_schedule() -> None:
    settings = TrainingSettings(tokens=1000, batch_tokens=10, peak_lr=1.0, warmup_fraction=0.1, final_lr_fraction=0.1)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[10] == 1.0
    assert rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)]
    assert math.isclose(rates[55], 0.1 + 0.9 * 0.5)
    assert 0.1 < rates[-1] < 0.101
