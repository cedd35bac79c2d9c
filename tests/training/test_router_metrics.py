"""The router metrics of known expert loads."""

import json
from typing import Any

import pytest
import torch

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.settings import RoutingSettings
from bam_ray.training.objective import ExpertLoad
from bam_ray.training.router_metrics import RouterMetrics
from tests.support import tiny
from tests.support.training_run import LENGTH, SETTINGS, engine

NAMES = ["seed", "code", "law", "math"]


def load(first: list[float], second: list[float], dropped: tuple[float, float] = (0.0, 0.0)) -> ExpertLoad:
    """Return the load of two layers and one domain."""
    return ExpertLoad(torch.tensor([[first], [second]]), torch.tensor([[0.5], [1.0]]), torch.tensor(dropped))


def metrics_of(domains: tuple[str, ...] = ("code",), names: list[str] = NAMES, **config: Any) -> RouterMetrics:
    mixture = BamForCausalLM(BamConfig(**{**tiny.SIZES, "num_experts": len(names), **config}, expert_names=names))
    return RouterMetrics(mixture, RoutingSettings(), mixture.state_dict(), domains)


def domain_curves(metrics: RouterMetrics) -> dict[str, float]:
    """Return the curves by domain, rounded to four digits."""
    report = metrics.report()
    found = {**report.scalars, **report.by_domain_and_layer}
    return {
        name.removeprefix("routing_by_domain/"): round(value, 4)
        for name, value in found.items()
        if name.startswith("routing_by_domain/")
    }


def test_a_report_covers_the_steps_since_the_last_one() -> None:
    sizes = {**tiny.SIZES, "num_hidden_layers": 3, "dense_layers": [1]}
    mixture = BamForCausalLM(BamConfig(**sizes, expert_names=NAMES))
    initial = {name: weight.clone() for name, weight in mixture.state_dict().items()}
    metrics = RouterMetrics(mixture, RoutingSettings(dead_below=0.1, overloaded_above=3.0), initial, ("code",))
    metrics.add(load([1.0, 0.0, 0.0, 0.0], [0.25] * 4))
    metrics.report()
    metrics.add(load([0.0, 0.0, 0.2, 0.8], [0.25] * 4))
    metrics.add(load([0.04, 0.0, 0.16, 0.8], [0.5, 0.5, 0.0, 0.0]))
    with torch.no_grad():
        mixture.model.layers[2].mlp.gate.weight.mul_(1.5)
    report = metrics.report()
    assert report.dead == ("layer 0 seed", "layer 0 code")
    assert report.overloaded == ("layer 0 math",)
    assert report.imbalance == pytest.approx(3.2)
    assert report.scalars["routing/layer_0/load_law"] == pytest.approx(0.18)
    assert report.scalars["routing/layer_2/load_law"] == pytest.approx(0.125)
    assert report.scalars["routing/layer_2/imbalance"] == pytest.approx(1.5)
    assert report.scalars["routing/layer_2/entropy"] == 1.0
    assert report.scalars["routing/layer_2/drift"] == pytest.approx(0.5)
    assert report.scalars["routing/layer_0/drift"] == report.scalars["routing/layer_2/attention_drift"] == 0.0
    assert report.scalars["routing/dead_experts"] == 2.0
    assert not [name for name in report.scalars if "layer_1" in name or "dropped" in name]


def test_dropped_choices_are_reported_with_a_capacity() -> None:
    metrics = metrics_of(capacity_factor=1.0)
    metrics.add(load([0.25] * 4, [0.25] * 4, (0.1, 0.2)))
    metrics.add(load([0.25] * 4, [0.25] * 4, (0.3, 0.2)))
    metrics.add(load([0.25] * 4, [0.25] * 4, (0.5, 0.2)))
    scalars = metrics.report().scalars
    assert scalars["routing/layer_0/dropped"] == scalars["routing/dropped"] == pytest.approx(0.3)
    assert scalars["routing/layer_1/dropped"] == pytest.approx(0.2)


def two_domains(code: list[float], law: list[float]) -> ExpertLoad:
    """Return the load of one layer by shares of all choices; the entropy is 1 nat in code and 0.5 nats in law."""
    return ExpertLoad(
        torch.tensor([[code, law]]), torch.tensor([[sum(code), 0.5 * sum(law)]], dtype=torch.double), torch.zeros(1)
    )


ONE_LAYER = {"num_hidden_layers": 2, "dense_layers": [0], "domains": ("code", "law"), "names": ["seed", "code"]}


def test_the_load_of_a_domain_is_the_mean_over_its_tokens() -> None:
    metrics = metrics_of(**ONE_LAYER)
    metrics.add(two_domains([0.1, 0.3], [0.6, 0.0]))
    metrics.add(two_domains([0.8, 0.0], [0.1, 0.1]))
    assert domain_curves(metrics) == {
        "code/layer_1/load_seed": 0.75,
        "code/layer_1/load_code": 0.25,
        "code/layer_1/entropy": 1.0,
        "code/layer_1/imbalance": 1.5,
        "code/layer_1/drift": 0.0,
        "code/entropy": 1.0,
        "code/imbalance": 1.5,
        "code/drift": 0.0,
        "law/layer_1/load_seed": 0.875,
        "law/layer_1/load_code": 0.125,
        "law/layer_1/entropy": 0.5,
        "law/layer_1/imbalance": 1.75,
        "law/layer_1/drift": 0.0,
        "law/entropy": 0.5,
        "law/imbalance": 1.75,
        "law/drift": 0.0,
    }


def test_drift_is_the_share_of_choices_changed_since_first_report() -> None:
    metrics = metrics_of(**ONE_LAYER)
    metrics.add(two_domains([0.5, 0.5], [0.0, 0.0]))
    assert not [name for name in domain_curves(metrics) if name.startswith("law")], "no sequence of law was seen"
    metrics.add(two_domains([0.4, 0.1], [0.1, 0.4]))
    found = domain_curves(metrics)
    assert (found["code/layer_1/drift"], found["law/layer_1/drift"]) == (0.3, 0.0)
    metrics.add(two_domains([0.0, 0.5], [0.4, 0.1]))
    found = domain_curves(metrics)
    assert (found["code/layer_1/drift"], found["law/layer_1/drift"]) == (0.5, 0.6)
    assert (found["code/drift"], found["law/drift"]) == (0.5, 0.6)


def test_over_layers_entropy_is_the_mean_and_others_the_worst() -> None:
    metrics = metrics_of(names=["seed", "code"])
    for code in ([0.5, 0.5], [0.75, 0.25]):
        metrics.add(ExpertLoad(torch.tensor([[code], [[0.9, 0.1]]]), torch.tensor([[0.2], [0.6]]), torch.zeros(2)))
        found = domain_curves(metrics)
    assert (found["code/entropy"], found["code/imbalance"], found["code/drift"]) == (0.4, 1.8, 0.25)


def test_restored_metrics_report_what_unbroken_metrics_report() -> None:
    generator = torch.Generator().manual_seed(0)
    loads = [two_domains(*torch.rand(2, 2, generator=generator).tolist()) for _ in range(7)]
    unbroken, broken = metrics_of(**ONE_LAYER), metrics_of(**ONE_LAYER)
    for metrics in (unbroken, broken):
        for seen in loads[:2]:
            metrics.add(seen)
        metrics.report()
        for seen in loads[2:5]:
            metrics.add(seen)
    resumed, rolled_back = metrics_of(**ONE_LAYER), broken
    state = json.dumps(broken.state_dict())
    rolled_back.add(loads[0])
    for metrics in (resumed, rolled_back):
        metrics.load_state_dict(json.loads(state))
    for metrics in (unbroken, resumed, rolled_back):
        for seen in loads[5:]:
            metrics.add(seen)
    assert unbroken.report() == resumed.report() == rolled_back.report()


def test_a_late_expert_had_no_load_before() -> None:
    before, after = metrics_of(**ONE_LAYER), metrics_of(**{**ONE_LAYER, "names": ["seed", "code", "law"]})
    before.add(two_domains([0.25, 0.25], [0.25, 0.25]))
    before.report()
    before.add(two_domains([0.5, 0.0], [0.5, 0.0]))
    after.load_state_dict(before.state_dict())
    after.add(two_domains([0.25, 0.25, 0.0], [0.0, 0.0, 0.5]))
    found = domain_curves(after)
    assert [found[f"law/layer_1/load_{name}"] for name in ("seed", "code", "law")] == [0.5, 0.0, 0.5]
    assert (found["law/layer_1/drift"], found["code/layer_1/drift"]) == (0.5, 0.25)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_the_load_of_a_step_by_domain_counts_the_choices(micro_batch: int) -> None:
    config = BamConfig(**{**tiny.SIZES, "num_hidden_layers": 3, "dense_layers": [0], "num_experts_per_tok": 2})
    trainer = engine(config, SETTINGS.model_copy(update={"micro_batch_sequences": micro_batch}))
    ids = tiny.tokens(4, LENGTH)
    of = [0, 2, 2, 0]  # no sequence of the second domain
    with torch.no_grad():
        logits = trainer.model(ids, output_router_logits=True).router_logits
    load = trainer.step(ids, 0.0, domains=torch.eye(3)[of]).expert_load
    assert load is not None and load.choices.shape == (2, 3, 4)

    counts, entropy = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    for layer, of_layer in enumerate(logits):
        for token, row in enumerate(of_layer):
            domain = of[token // LENGTH]
            probabilities = row.softmax(0)
            for expert in sorted(range(4), key=probabilities.__getitem__)[-2:]:
                counts[layer, domain, expert] += 1
            entropy[layer, domain] -= (probabilities * probabilities.log()).sum()
    torch.testing.assert_close(load.choices, counts / (2 * ids.numel()))
    torch.testing.assert_close(load.entropy, entropy / ids.numel())
    torch.testing.assert_close(load.share.sum(-1), torch.ones(2))
