"""A run that is stopped, killed or rolled back gives the losses of an undisturbed run."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bam_ray.blobs.memory import MemoryStore
from bam_ray.control.policies import is_final
from bam_ray.errors import Interrupted, LossNotFinite, LossSpiked, SettingsError
from bam_ray.settings import Spike, TrainingSettings
from bam_ray.training import gradient_accumulation
from bam_ray.training.events import BatchSkipped, Event, MicroBatchHalved, RolledBack, SegmentStarted
from bam_ray.training.listener import StepMetrics, TrainingListener
from bam_ray.training.loop import ComputeSegment, Training
from bam_ray.training.schedule import learning_rate
from bam_ray.training.torch_engine import TorchEngine
from tests.support import tiny
from tests.support.leases import next_lease
from tests.support.training_run import BAM, DENSE, LENGTH, SETTINGS, CountingSampler, checkpoints_of, engine, run

DROPOUT = LlamaConfig(**tiny.SIZES, attention_dropout=0.3)


@pytest.mark.parametrize("config", [BAM, DENSE, DROPOUT], ids=["mixture", "dense", "dropout"])
def test_a_resumed_run_has_bitwise_the_losses_of_an_unbroken_run(config: Any) -> None:
    unbroken = run(MemoryStore(), config=config)
    assert len(unbroken) == 12
    store = MemoryStore()
    with pytest.raises(Interrupted, match="step 6 of 12"):
        run(store, lambda step: step == 6, config=config)
    assert run(store, config=config) == unbroken


def test_a_killed_run_resumes_from_the_last_checkpoint() -> None:
    unbroken = run(MemoryStore())
    store = MemoryStore()

    def die(step: int) -> bool:
        if step == 7:
            raise ZeroDivisionError  # as a kill: nothing is saved at step 7
        return False

    with pytest.raises(ZeroDivisionError):
        run(store, die)
    assert run(store) == unbroken


def test_losses_do_not_depend_on_the_memory_of_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run starts on a node that holds a whole batch, and resumes on nodes that hold one and two sequences."""
    unbroken = run(MemoryStore())
    store = MemoryStore()
    events: list[Event] = []

    def run_with_memory_for(sequences: int, stop_at: int) -> list[float]:
        monkeypatch.setattr(
            gradient_accumulation, "find_largest_micro_batch", lambda trial, limit, *more: min(limit, sequences)
        )
        return run(store, lambda step: step == stop_at, events=events)

    for sequences, stop_at in ((4, 3), (1, 7)):
        with pytest.raises(Interrupted):
            run_with_memory_for(sequences, stop_at)
    np.testing.assert_allclose(run_with_memory_for(2, 12), unbroken, atol=1e-5)
    started = [(each.step, each.micro_batch) for each in events if isinstance(each, SegmentStarted)]
    changed = [(each.step, each.sequences) for each in events if isinstance(each, MicroBatchHalved)]
    assert sorted(started + changed) == [(1, 4), (4, 1), (8, 2)]


def test_each_compute_segment_counts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    events: list[Event] = []
    monkeypatch.setattr(TorchEngine, "world_size", 2)
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 7, events=events)
    monkeypatch.setattr(TorchEngine, "world_size", 1)
    run(store, events=events)
    started = [event for event in events if isinstance(event, SegmentStarted)]
    assert [(event.step, event.processes) for event in started] == [(1, 2), (8, 1)]


def test_device_seconds_count_all_processes_of_each_step() -> None:
    checkpoints = checkpoints_of(MemoryStore(), None)
    training = Training(engine(), CountingSampler(), LENGTH, SETTINGS, checkpoints, TrainingListener())
    speed = SETTINGS.batch_tokens / 3  # three seconds per step
    training.curve = [StepMetrics(step, 1.0, 0.0, 0.0, 1.0, 1e-2, speed) for step in range(1, 13)]
    training.segments = [
        ComputeSegment(1, "cuda", "bf16", 4, processes=8),
        ComputeSegment(6, "cuda", "bf16", 2, processes=8),
    ]
    assert training.device_seconds() == pytest.approx(12 * 3 * 8)
    training.segments.append(ComputeSegment(10, "cuda", "bf16", 4, processes=2))
    assert training.device_seconds() == pytest.approx(9 * 3 * 8 + 3 * 3 * 2)


def nan_at(steps: set[int], factor: float = float("nan")) -> PreTrainedModel:
    """Return a model whose last hidden states are multiplied by `factor` in the given calls, counted from 1."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(DENSE)
    calls = itertools.count(1)

    def spoil(module: object, inputs: object, out: Any) -> Any:
        if next(calls) in steps:
            out.last_hidden_state = out.last_hidden_state * factor
        return out

    model.base_model.register_forward_hook(spoil)
    return model


FIXED = SETTINGS.model_copy(update={"micro_batch_sequences": 4})  # each step calls the model once


def test_a_single_non_finite_loss_is_rolled_back_and_retried() -> None:
    unbroken = run(MemoryStore(), settings=FIXED, model=nan_at(set()))
    events: list[Event] = []
    losses = run(MemoryStore(), settings=FIXED, model=nan_at({7}), events=events)
    assert losses == unbroken
    (rollback,) = (event for event in events if isinstance(event, RolledBack))
    assert (rollback.step, rollback.to) == (7, 4)
    assert "the loss (nan)" in rollback.error


def test_before_the_first_checkpoint_a_rollback_is_to_step_0() -> None:
    assert run(MemoryStore(), settings=FIXED, model=nan_at({2})) == run(
        MemoryStore(), settings=FIXED, model=nan_at(set())
    )


def test_a_repeated_non_finite_loss_fails_the_run() -> None:
    with pytest.raises(LossNotFinite, match=r"^step 7: the loss \(nan\).* \(2 in a row\).* set on_not_finite") as error:
        run(MemoryStore(), settings=FIXED, model=nan_at({7, 10}))  # steps 5 and 6 are calls 8 and 9
    assert is_final(error.value)


def test_two_losses_far_apart_are_two_rollbacks() -> None:
    unbroken = run(MemoryStore(), settings=FIXED, model=nan_at(set()))
    assert run(MemoryStore(), settings=FIXED, model=nan_at({7, 14})) == unbroken


def bad_loss_events(events: list[Event]) -> list[tuple[int, int | None]]:
    """Return the step of each skipped batch and of each rollback, with the step that was rolled back to."""
    return [
        (event.step, event.to if isinstance(event, RolledBack) else None)
        for event in events
        if isinstance(event, RolledBack | BatchSkipped)
    ]


def run_with_bad_batches(
    on_not_finite: str, batches: set[int], store: MemoryStore | None = None, **named: Any
) -> tuple[list[float], list[tuple[int, int | None]]]:
    """Run on data of which the given batches, counted from 1, make every loss NaN; return its losses and events."""
    model, data = nan_at(set()), CountingSampler()
    events: list[Event] = []
    taken = [data.take(4)[0] for _ in range(max(batches))]
    bad = [taken[number - 1] for number in batches]

    def spoil(module: object, inputs: object, named: dict[str, Any], out: Any) -> Any:
        if any(np.array_equal(named["input_ids"], batch) for batch in bad):
            out.last_hidden_state = out.last_hidden_state * float("nan")
        return out

    model.base_model.register_forward_hook(spoil, with_kwargs=True)
    losses = run(
        store or MemoryStore(),
        settings=FIXED.model_copy(update={"on_not_finite": on_not_finite}),
        model=model,
        events=events,
        **named,
    )
    return losses, bad_loss_events(events)


def test_a_retry_does_not_help_with_a_bad_batch() -> None:
    with pytest.raises(LossNotFinite, match=r"^step 7: .* \(2 in a row\)"):
        run_with_bad_batches("retry", {7})


def test_a_batch_that_makes_the_loss_nan_is_skipped() -> None:
    unbroken = run(MemoryStore(), settings=FIXED)
    losses, events = run_with_bad_batches("skip", {7})
    assert events == [(7, None)]
    assert losses[:6] == unbroken[:6]
    assert len(losses) == 12 and all(map(math.isfinite, losses))
    assert losses[6] != unbroken[6], "the next batch takes its place"


def test_a_rollback_from_a_nan_skips_its_data() -> None:
    unbroken = run(MemoryStore(), settings=FIXED)
    losses, events = run_with_bad_batches("roll_back", {7})
    assert events == [(7, 4)]
    assert losses[:4] == unbroken[:4]
    assert len(losses) == 12 and all(map(math.isfinite, losses))
    assert losses[4] != unbroken[4], "the batches of steps 5 to 7 are skipped"


def test_a_nan_fails_the_run_with_on_not_finite_stop() -> None:
    with pytest.raises(LossNotFinite, match=r"^step 7: the loss \(nan\).* \(1 in a row\)"):
        run_with_bad_batches("stop", {7})


@pytest.mark.parametrize("on_not_finite", ["skip", "roll_back"])
def test_a_run_that_had_a_nan_resumes_exactly(on_not_finite: str) -> None:
    unbroken, _ = run_with_bad_batches(on_not_finite, {7})
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run_with_bad_batches(on_not_finite, {7}, store, should_stop=lambda step: step == 8)
    assert run_with_bad_batches(on_not_finite, {7}, store)[0] == unbroken


@pytest.mark.parametrize("on_not_finite", ["skip", "roll_back"])
def test_too_many_bad_batches_fail_the_run(on_not_finite: str) -> None:
    run_with_bad_batches("skip", set(range(5, 15)))  # ten
    with pytest.raises(LossNotFinite, match=r"\(11 in a row\)"):
        run_with_bad_batches(on_not_finite, set(range(5, 200)))


SPIKE = 100.0  # factor on the hidden states
SHORT_WINDOW = Spike(window=4, loss=3.0, grad_norm=1000.0)


def spike_settings(on_spike: str, spike: Spike = SHORT_WINDOW) -> TrainingSettings:
    return FIXED.model_copy(update={"on_spike": on_spike, "spike": spike})


def run_with_spikes(
    on_spike: str, calls: set[int], store: MemoryStore | None = None, **named: Any
) -> tuple[list[float], list[tuple[int, int | None]]]:
    """Run with spikes in the given calls of the model; return its losses and events."""
    events: list[Event] = []
    losses = run(
        store or MemoryStore(),
        settings=spike_settings(on_spike, named.pop("spike", SHORT_WINDOW)),
        model=nan_at(calls, SPIKE),
        events=events,
        **named,
    )
    return losses, bad_loss_events(events)


def test_a_spike_is_ignored_by_default() -> None:
    losses, events = run_with_spikes("ignore", {7})
    assert losses[6] > 3 * losses[5]
    assert not events


def test_a_spike_is_skipped_with_its_batch() -> None:
    unbroken = run(MemoryStore(), settings=FIXED)
    losses, events = run_with_spikes("skip", {7})
    assert events == [(7, None)]
    assert losses[:6] == unbroken[:6]
    assert max(losses) < 3 * unbroken[0]
    assert losses[6] != unbroken[6], "the next batch takes its place"


def test_a_high_gradient_norm_is_a_spike() -> None:
    losses, events = run_with_spikes("skip", {7}, spike=Spike(window=4, loss=1000.0, grad_norm=3.0))
    assert events == [(7, None)]
    assert max(losses) < 3 * losses[0]


def test_a_rollback_from_a_spike_skips_its_data() -> None:
    losses, events = run_with_spikes("roll_back", {7})
    assert events == [(7, 4)]
    unbroken = run(MemoryStore(), settings=FIXED)
    assert losses[:4] == unbroken[:4]
    assert losses[4] != unbroken[4], "the batches of steps 5 to 7 are skipped"
    assert max(losses) < 3 * unbroken[0]


@pytest.mark.parametrize("on_spike", ["skip", "roll_back"])
def test_a_run_that_had_a_spike_resumes_exactly(on_spike: str) -> None:
    unbroken, _ = run_with_spikes(on_spike, {7})
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run_with_spikes(on_spike, {7}, store, should_stop=lambda step: step == 8)
    assert run(store, settings=spike_settings(on_spike), model=nan_at(set())) == unbroken


@pytest.mark.parametrize("changed", [0, 6])
def test_losses_from_before_a_new_expert_define_no_spike(changed: int) -> None:
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run_with_spikes("skip", set(), store, should_stop=lambda step: step == 6)
    checkpoints = checkpoints_of(store, next_lease(store, "branches/x"))
    found, changed_engine = checkpoints.latest(), engine(settings=FIXED)
    assert found is not None
    changed_engine.load(found.folder)
    checkpoints.save(changed_engine.state(), {**found.trainer, "changed": changed})
    checkpoints.wait()
    with pytest.raises(Interrupted):  # later checkpoints store the step too
        run_with_spikes("skip", set(), store, should_stop=lambda step: step == 7)
    _, events = run_with_spikes("skip", {2}, store)
    assert events == ([] if changed else [(9, None)])


def test_a_spike_fails_the_run_with_on_spike_stop() -> None:
    with pytest.raises(LossSpiked, match=r"^step 7: the loss \(.*\) is above .*: lower peak_lr") as error:
        run_with_spikes("stop", {7})
    assert is_final(error.value)


@pytest.mark.parametrize("on_spike", ["skip", "roll_back"])
def test_too_many_spikes_fail_the_run(on_spike: str) -> None:
    with pytest.raises(LossSpiked, match=r"\(11 in a row\)"):
        run_with_spikes(on_spike, set(range(5, 1000)))


def test_a_skipped_spike_does_not_count_as_a_retry_of_a_nan() -> None:
    model = nan_at({7}, SPIKE)
    calls = itertools.count(1)
    model.base_model.register_forward_hook(
        lambda module, inputs, out: setattr(
            out, "last_hidden_state", out.last_hidden_state * float("nan" if next(calls) == 8 else 1)
        )
    )
    assert len(run(MemoryStore(), settings=spike_settings("skip"), model=model)) == 12


def test_a_batch_smaller_than_a_sequence_is_refused() -> None:
    with pytest.raises(SettingsError, match="cannot divide evenly"):
        run(MemoryStore(), settings=SETTINGS.model_copy(update={"batch_tokens": LENGTH - 1}))


def test_learning_rate_has_warm_up_and_cosine_decay() -> None:
    settings = TrainingSettings(tokens=1000, batch_tokens=10, peak_lr=1.0, warmup_fraction=0.1, final_lr_fraction=0.1)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[10] == 1.0
    assert rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)]
    assert math.isclose(rates[55], 0.1 + 0.9 * 0.5)
    assert 0.1 < rates[-1] < 0.101
