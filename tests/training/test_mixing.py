"""Mixing settings in a step: auxiliary losses, selection biases, and the parameters that are trained."""

from typing import Any

import pytest
import torch

from bam_ray.blobs.memory import MemoryStore
from bam_ray.errors import Interrupted
from bam_ray.model import BamConfig
from bam_ray.settings import Losses, Mixing, Ramp
from bam_ray.training.param_groups import parameter_kinds
from bam_ray.training.torch_engine import TorchEngine
from tests.support import tiny
from tests.support.training_run import BAM, LENGTH, SETTINGS, engine, run

IDS = tiny.tokens(4, LENGTH)
KV_SHARED = BamConfig(**{**tiny.SIZES, "attention_experts": "kv_shared", "num_experts_per_tok": 2})
NOISY = BamConfig(**{**tiny.SIZES, "num_experts_per_tok": 2, "noisy_gate": True})
BIASED = BamConfig(**{**tiny.SIZES, "num_experts_per_tok": 2, "selection_bias": True})


def after(trainer: TorchEngine, steps: int = 1, lr: float = 1e-2) -> dict[str, torch.Tensor]:
    for _ in range(steps):
        trainer.step(IDS, lr)
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], trainer: TorchEngine) -> set[str]:
    """Return the kinds of parameters that changed; asserts that of each kind all parameters changed, or none."""
    changed: dict[str, set[bool]] = {}
    for name, parameter, kind in parameter_kinds(trainer.model):
        changed.setdefault(kind, set()).add(not torch.equal(parameter.detach(), before[name]))
    assert all(len(each) == 1 for each in changed.values()), changed
    return {kind for kind, each in changed.items() if each == {True}}


def test_recomputation_counts_the_router_losses_once() -> None:
    found = []
    for recomputed in (False, True):
        trainer = engine(BAM, mixing=Mixing(losses=Losses(load_balance=1.0, router_z=0.5)))
        if recomputed:
            trainer.model.activation_checkpointing_enable()
        result = trainer.step(IDS, 1e-3)
        found.append(
            (
                [result.nll, result.load_balance, result.router_z, result.grad_norm],
                {k: v["exp_avg"] for k, v in trainer.optimizer.state.items()}.values(),
            )
        )
    (plain, gradients), (again, others) = found
    assert again == pytest.approx(plain, rel=1e-6)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-7)


def test_a_ramp_is_linear_and_then_constant() -> None:
    ramp = Ramp(start=0.1, end=0.0, steps_fraction=0.5)
    assert [ramp.at(done) for done in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.1, 0.05, 0.0, 0.0])
    part = ramp.at(0.25)
    assert Losses(load_balance=ramp).at(0.25) == Losses(load_balance=part)
    assert Losses(load_balance=0.2, router_z=ramp).at(0.25) == Losses(load_balance=0.2, router_z=part)


def test_the_coefficients_follow_the_ramps_after_a_resume() -> None:
    falling = Mixing(losses=Losses(load_balance=Ramp(start=1.0, end=0.0), router_z=Ramp(start=0.0, end=0.5)))
    constant = Mixing(losses=Losses(load_balance=0.5, router_z=0.25))
    trainer, other = engine(BAM, mixing=falling), engine(BAM, mixing=constant)
    for each in (trainer, other):  # as if a checkpoint of step 6 of 12 were loaded
        each.reset_optimizer(6)
    one, two = after(trainer), after(other)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_biases_move_towards_balance_by_their_rate() -> None:
    trainer = engine(BIASED, mixing=Mixing(losses=Losses(bias_rate=0.01)))
    load = trainer.step(IDS, 0.0).expert_load
    assert load is not None
    torch.testing.assert_close(load.share.sum(-1), torch.ones(2))
    bias = trainer.model.selection_biases()
    assert bias is not None
    torch.testing.assert_close(bias, torch.where(load.share < 0.25, 0.01, torch.where(load.share > 0.25, -0.01, 0.0)))
    torch.manual_seed(0)
    imbalance = []
    for _ in range(60):
        imbalance.append(trainer.step(IDS, 0.0).expert_load.share.max().item())
    assert sum(imbalance[-10:]) < sum(imbalance[:10])


def test_a_step_reports_the_choices_that_exceed_the_capacity() -> None:
    """The micro batch does not matter, because each sequence has its own capacity."""
    found = []
    for factor, micro_batch in ((0.5, 4), (0.5, 1), (None, 4)):
        config = BamConfig(**{**KV_SHARED.to_dict(), "capacity_factor": factor})
        trainer = engine(config, SETTINGS.model_copy(update={"micro_batch_sequences": micro_batch}))
        result = trainer.step(IDS, 1e-3)
        assert result.expert_load is not None
        found.append((result.nll, result.expert_load.dropped.tolist()))
    whole, parts, without = found
    assert parts == (pytest.approx(whole[0]), pytest.approx(whole[1]))
    assert min(whole[1]) > 0
    assert without[1] == [0.0, 0.0] and without[0] != pytest.approx(whole[0])


@pytest.mark.parametrize(
    ("config", "mixing"),
    [
        (NOISY, Mixing(losses=Losses(load_balance=Ramp(start=0.1, end=0.01)), gate="noisy")),
        (BIASED, Mixing(losses=Losses(bias_rate=0.01))),
        (BAM, Mixing(train="routers_and_shared", router_warmup_fraction=0.4)),
        (BAM, Mixing(router_warmup_fraction=0.4, expert_lr_factor=0.1)),
    ],
    ids=["noise, ramp", "biases", "frozen experts", "warm-up"],
)
def test_a_resumed_run_has_bitwise_the_losses_of_an_unbroken_run(config: BamConfig, mixing: Mixing) -> None:
    unbroken = run(MemoryStore(), config=config, mixing=mixing)
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 6, config=config, mixing=mixing)
    assert run(store, config=config, mixing=mixing) == unbroken


@pytest.mark.parametrize("config", [BAM, KV_SHARED], ids=["kv_experts", "kv_shared"])
@pytest.mark.parametrize(
    ("train", "kinds_trained"),
    [("all", {"expert", "router", "shared"}), ("routers_and_shared", {"router", "shared"}), ("routers", {"router"})],
)
def test_only_trained_parameters_change_and_have_optimizer_states(
    config: BamConfig, train: Any, kinds_trained: set[str]
) -> None:
    trainer = engine(config, mixing=Mixing(train=train))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    passed: list[str] = []
    for name, parameter, kind in parameter_kinds(trainer.model):
        if kind in kinds_trained:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: passed.append(name))
        else:
            assert not parameter.requires_grad
    trainer.step(IDS, 1e-2)
    assert moved(before, trainer) == kinds_trained
    names = {name for name, _, kind in parameter_kinds(trainer.model) if kind in kinds_trained}
    assert set(passed) == names
    state = trainer.state()
    assert {name.rpartition(".exp_avg")[0] for name in state.optimizer} == names


def test_keys_and_values_that_all_experts_share_count_as_shared() -> None:
    found = {name.partition("self_attn.")[2]: kind for name, _, kind in parameter_kinds(engine(KV_SHARED).model)}
    assert found["attention_experts.q_proj"] == found["attention_experts.o_proj"] == "expert"
    assert found["attention_experts.k_proj"] == found["attention_experts.v_proj"] == "shared"


def test_only_the_routers_change_during_their_warm_up() -> None:
    trainer = engine(BAM, mixing=Mixing(router_warmup_fraction=0.25))  # of 12 steps
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    after(trainer, 3)
    assert moved(before, trainer) == {"router"}
    after(trainer)
    assert moved(before, trainer) == {"router", "shared", "expert"}


def test_experts_have_their_own_learning_rate() -> None:
    before = {name: tensor.clone() for name, tensor in engine(BAM).model.state_dict().items()}
    no_decay = SETTINGS.model_copy(update={"weight_decay": 0.0})
    plain, slowed = (after(engine(BAM, no_decay, Mixing(expert_lr_factor=factor))) for factor in (1.0, 0.1))
    for name, _, kind in parameter_kinds(engine(BAM).model):
        whole, part = plain[name] - before[name], slowed[name] - before[name]
        torch.testing.assert_close(part, whole * (0.1 if kind == "expert" else 1.0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train": "routers", "router_warmup_fraction": 0.1},
            "router_warmup_fraction has no effect with train: routers",
        ),
        (
            {"train": "routers_and_shared", "expert_lr_factor": 0.5},
            "expert_lr_factor has no effect with train: routers_and_shared",
        ),
        ({"gate": "noisy", "losses": {"bias_rate": 0.1}}, "losses.bias_rate and gate: noisy exclude each other"),
    ],
)
def test_settings_without_an_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixing(**settings)
