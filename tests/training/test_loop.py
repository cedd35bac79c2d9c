"""A run that was stopped, killed or went wrong on the way gives the losses of one that was not."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.leases import Lease
from bam_ray.control.policies import is_final
from bam_ray.errors import Interrupted, LossNotFinite, LossSpiked, SettingsError
from bam_ray.settings import Spike, TrainingSettings
from bam_ray.training.checkpoints import Checkpoints
from bam_ray.training.engine import TorchEngine
from bam_ray.training.loop import Leg, Point, Training
from bam_ray.training.schedule import learning_rate
from tests.support import tiny
from tests.support.training_run import BAM, DENSE, LENGTH, RETENTION, SETTINGS, CountingSampler, engine, run

DROPOUT = LlamaConfig(**tiny.SIZES, attention_dropout=0.3)


@pytest.mark.parametrize("config", [BAM, DENSE, DROPOUT], ids=["mixture", "dense", "dropout"])
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


def test_losses_do_not_depend_on_the_memory_of_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun on a node that holds the whole batch, gone on with on one that holds a sequence, ended on one between."""
    unbroken = run(MemoryStore())
    store = MemoryStore()
    legs: list[tuple[int, int]] = []

    def tell(what: str, **facts: Any) -> None:
        if what in ("computing", "micro_batch"):
            legs.append((facts["step"], facts.get("micro_batch") or facts["sequences"]))

    def on_a_node_that_holds(sequences: int, stop_at: int) -> list[float]:
        monkeypatch.setattr(TorchEngine, "_fit", lambda self, input_ids: min(len(input_ids), sequences))
        return run(store, lambda step: step == stop_at, tell=tell)

    for sequences, stop_at in ((4, 3), (1, 7)):
        with pytest.raises(Interrupted):
            on_a_node_that_holds(sequences, stop_at)
    np.testing.assert_allclose(on_a_node_that_holds(2, 12), unbroken, atol=1e-5)
    assert legs == [(1, 4), (4, 1), (8, 2)]


def test_gone_on_with_by_fewer_processes_each_leg_counts_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    legs: list[tuple[int, int]] = []

    def tell(what: str, **facts: Any) -> None:
        if what == "computing":
            legs.append((facts["step"], facts["processes"]))

    monkeypatch.setattr(TorchEngine, "world_size", 2)
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 7, tell=tell)
    monkeypatch.setattr(TorchEngine, "world_size", 1)
    run(store, tell=tell)
    assert legs == [(1, 2), (8, 1)]


def test_time_spent_is_that_of_all_processes_of_each_step() -> None:
    checkpoints = Checkpoints(MemoryStore(), "branches", "x", None, RETENTION)
    training = Training(
        engine(), CountingSampler(), LENGTH, SETTINGS, checkpoints, lambda _: None, lambda *_, **__: None, lambda: False
    )
    speed = SETTINGS.batch_tokens / 3  # three seconds a step
    training.curve = [Point(step, 1.0, 0.0, 0.0, 1.0, 1e-2, speed) for step in range(1, 13)]
    training.legs = [Leg(1, "cuda", "bf16", 4, processes=8), Leg(6, "cuda", "bf16", 2, processes=8)]
    assert training.device_seconds() == pytest.approx(12 * 3 * 8)
    training.legs.append(Leg(10, "cuda", "bf16", 4, processes=2))
    assert training.device_seconds() == pytest.approx(9 * 3 * 8 + 3 * 3 * 2)


def nan_at(steps: set[int], factor: float = float("nan")) -> PreTrainedModel:
    """A model whose loss is NaN, or high, at the given calls of `forward`, counted from 1."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(DENSE)
    calls = itertools.count(1)

    def spoil(module: object, inputs: object, out: Any) -> Any:
        if next(calls) in steps:
            out.last_hidden_state = out.last_hidden_state * factor
        return out

    model.base_model.register_forward_hook(spoil)
    return model


FIXED = SETTINGS.model_copy(update={"micro_batch_sequences": 4})  # a step is one call


def test_a_loss_that_is_not_finite_once_is_rolled_back_and_done_again() -> None:
    unbroken = run(MemoryStore(), settings=FIXED, model=nan_at(set()))
    told: list[tuple[str, dict[str, Any]]] = []
    losses = run(
        MemoryStore(), settings=FIXED, model=nan_at({7}), tell=lambda what, **facts: told.append((what, facts))
    )
    assert losses == unbroken
    back = [facts for what, facts in told if what == "rolled_back"]
    assert [(facts["step"], facts["to"]) for facts in back] == [(7, 4)]
    assert "the loss (nan)" in back[0]["error"]


def test_before_the_first_checkpoint_it_goes_back_to_the_start() -> None:
    assert run(MemoryStore(), settings=FIXED, model=nan_at({2})) == run(
        MemoryStore(), settings=FIXED, model=nan_at(set())
    )


def test_a_loss_that_stays_not_finite_ends_the_run_for_good() -> None:
    with pytest.raises(LossNotFinite, match=r"^step 7: the loss \(nan\).* \(2 in a row\).* set on_not_finite") as error:
        run(MemoryStore(), settings=FIXED, model=nan_at({7, 10}))  # steps 5 and 6 are calls 8 and 9
    assert is_final(error.value)


def test_two_losses_far_apart_are_two_rollbacks() -> None:
    unbroken = run(MemoryStore(), settings=FIXED, model=nan_at(set()))
    assert run(MemoryStore(), settings=FIXED, model=nan_at({7, 14})) == unbroken


def with_a_bad_batch(on_not_finite: str, batches: set[int], store: MemoryStore | None = None, **named: Any) -> Any:
    """The losses of a run on data of which the given batches, from 1, make every loss NaN, and what it told."""
    model, data = nan_at(set()), CountingSampler()
    told: list[tuple[str, dict[str, Any]]] = []
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
        tell=lambda what, **facts: told.append((what, facts)),
        **named,
    )
    return losses, [(facts["step"], facts.get("to")) for what, facts in told if what in ("skipped", "rolled_back")]


def test_what_a_batch_does_is_not_mended_by_trying_again() -> None:
    with pytest.raises(LossNotFinite, match=r"^step 7: .* \(2 in a row\)"):
        with_a_bad_batch("retry", {7})


def test_a_batch_that_makes_the_loss_nan_is_skipped() -> None:
    unbroken = run(MemoryStore(), settings=FIXED)
    losses, told = with_a_bad_batch("skip", {7})
    assert told == [(7, None)]
    assert losses[:6] == unbroken[:6]
    assert len(losses) == 12 and all(map(math.isfinite, losses))
    assert losses[6] != unbroken[6], "the batch after it takes its place"


def test_going_back_from_a_nan_leaves_its_data_out() -> None:
    unbroken = run(MemoryStore(), settings=FIXED)
    losses, told = with_a_bad_batch("roll_back", {7})
    assert told == [(7, 4)]
    assert losses[:4] == unbroken[:4]
    assert len(losses) == 12 and all(map(math.isfinite, losses))
    assert losses[4] != unbroken[4], "the batches of steps 5 to 7 are left out"


def test_a_nan_stops_the_run_where_it_should() -> None:
    with pytest.raises(LossNotFinite, match=r"^step 7: the loss \(nan\).* \(1 in a row\)"):
        with_a_bad_batch("stop", {7})


@pytest.mark.parametrize("on_not_finite", ["skip", "roll_back"])
def test_a_run_that_met_a_nan_resumes_exactly(on_not_finite: str) -> None:
    unbroken, _ = with_a_bad_batch(on_not_finite, {7})
    store = MemoryStore()
    with pytest.raises(Interrupted):
        with_a_bad_batch(on_not_finite, {7}, store, should_stop=lambda step: step == 8)
    assert with_a_bad_batch(on_not_finite, {7}, store)[0] == unbroken


@pytest.mark.parametrize("on_not_finite", ["skip", "roll_back"])
def test_bad_batches_without_end_end_the_run(on_not_finite: str) -> None:
    with_a_bad_batch("skip", set(range(5, 15)))  # ten
    with pytest.raises(LossNotFinite, match=r"\(11 in a row\)"):
        with_a_bad_batch(on_not_finite, set(range(5, 200)))


SPIKE = 100.0  # on the logits
FEW = Spike(window=4, loss=3.0, grad_norm=1000.0)


def with_spikes(on_spike: str, spike: Spike = FEW) -> TrainingSettings:
    return FIXED.model_copy(update={"on_spike": on_spike, "spike": spike})


def spiky(on_spike: str, calls: set[int], store: MemoryStore | None = None, **named: Any) -> tuple[list[float], Any]:
    """The losses of a run with spikes at the given calls, and what it told."""
    told: list[tuple[str, dict[str, Any]]] = []
    losses = run(
        store or MemoryStore(),
        settings=with_spikes(on_spike, named.pop("spike", FEW)),
        model=nan_at(calls, SPIKE),
        tell=lambda what, **facts: told.append((what, facts)),
        **named,
    )
    return losses, [(facts["step"], facts.get("to")) for what, facts in told if what in ("skipped", "rolled_back")]


def test_a_spike_is_left_alone_by_default() -> None:
    losses, told = spiky("ignore", {7})
    assert losses[6] > 3 * losses[5]
    assert not told


def test_a_spike_is_skipped_with_its_batch() -> None:
    unbroken = run(MemoryStore(), settings=FIXED)
    losses, told = spiky("skip", {7})
    assert told == [(7, None)]
    assert losses[:6] == unbroken[:6]
    assert max(losses) < 3 * unbroken[0]
    assert losses[6] != unbroken[6], "the batch after it takes its place"


def test_a_high_gradient_is_a_spike_too() -> None:
    losses, told = spiky("skip", {7}, spike=Spike(window=4, loss=1000.0, grad_norm=3.0))
    assert told == [(7, None)]
    assert max(losses) < 3 * losses[0]


def test_going_back_from_a_spike_leaves_its_data_out() -> None:
    losses, told = spiky("roll_back", {7})
    assert told == [(7, 4)]
    unbroken = run(MemoryStore(), settings=FIXED)
    assert losses[:4] == unbroken[:4]
    assert losses[4] != unbroken[4], "the batches of steps 5 to 7 are left out"
    assert max(losses) < 3 * unbroken[0]


@pytest.mark.parametrize("on_spike", ["skip", "roll_back"])
def test_a_run_that_met_a_spike_resumes_exactly(on_spike: str) -> None:
    unbroken, _ = spiky(on_spike, {7})
    store = MemoryStore()
    with pytest.raises(Interrupted):
        spiky(on_spike, {7}, store, should_stop=lambda step: step == 8)
    assert run(store, settings=with_spikes(on_spike), model=nan_at(set())) == unbroken


@pytest.mark.parametrize("changed", [0, 6])
def test_what_is_a_spike_is_not_told_by_losses_from_before_the_model_got_experts(changed: int) -> None:
    store = MemoryStore()
    with pytest.raises(Interrupted):
        spiky("skip", set(), store, should_stop=lambda step: step == 6)
    kept = Checkpoints(store, "branches", "x", Lease.take(store, "branches/x"), RETENTION)
    found, grown = kept.latest(), engine(settings=FIXED)
    assert found is not None
    grown.load(found.folder)
    kept.save(grown.state(), {**found.trainer, "changed": changed})
    kept.wait()
    with pytest.raises(Interrupted):  # a checkpoint after it knows too
        spiky("skip", set(), store, should_stop=lambda step: step == 7)
    _, told = spiky("skip", {2}, store)
    assert told == ([] if changed else [(9, None)])


def test_a_spike_stops_the_run_where_it_should() -> None:
    with pytest.raises(LossSpiked, match=r"^step 7: the loss \(.*\) is above .*: lower peak_lr") as error:
        spiky("stop", {7})
    assert is_final(error.value)


@pytest.mark.parametrize("on_spike", ["skip", "roll_back"])
def test_spikes_without_end_end_the_run(on_spike: str) -> None:
    with pytest.raises(LossSpiked, match=r"\(11 in a row\)"):
        spiky(on_spike, set(range(5, 1000)))


def test_a_skipped_spike_is_no_try_of_a_nan_after_it() -> None:
    model = nan_at({7}, SPIKE)
    calls = itertools.count(1)
    model.base_model.register_forward_hook(
        lambda module, inputs, out: setattr(
            out, "last_hidden_state", out.last_hidden_state * float("nan" if next(calls) == 8 else 1)
        )
    )
    assert len(run(MemoryStore(), settings=with_spikes("skip"), model=model)) == 12


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
