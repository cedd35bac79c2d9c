"""What is said of routers is what they did."""

import pytest
import tiny
import torch

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.settings import RoutingSettings
from bam_ray.training.objective import Load
from bam_ray.training.watching import RoutingWatch

NAMES = ["seed", "code", "law", "math"]


def load(first: list[float], second: list[float], dropped: tuple[float, float] = (0.0, 0.0)) -> Load:
    return Load(torch.tensor([first, second]), torch.tensor([0.5, 1.0]), torch.tensor(dropped))


def test_a_report_is_of_the_steps_since_the_last() -> None:
    sizes = {**tiny.SIZES, "num_hidden_layers": 3, "dense_layers": [1]}
    mixture = BamForCausalLM(BamConfig(**sizes, expert_names=NAMES))
    began = {name: weight.clone() for name, weight in mixture.state_dict().items()}
    watch = RoutingWatch(mixture, RoutingSettings(dead_below=0.1, overloaded_above=3.0), began)
    watch.add(load([1.0, 0.0, 0.0, 0.0], [0.25] * 4))
    watch.report()
    watch.add(load([0.0, 0.0, 0.2, 0.8], [0.25] * 4))
    watch.add(load([0.04, 0.0, 0.16, 0.8], [0.5, 0.5, 0.0, 0.0]))
    with torch.no_grad():
        mixture.model.layers[2].mlp.gate.weight.mul_(1.5)
    report = watch.report()
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


def test_what_is_dropped_is_told_where_there_is_a_capacity() -> None:
    mixture = BamForCausalLM(BamConfig(**tiny.SIZES, capacity_factor=1.0))
    watch = RoutingWatch(mixture, RoutingSettings(), mixture.state_dict())
    watch.add(load([0.25] * 4, [0.25] * 4, (0.1, 0.2)))
    watch.add(load([0.25] * 4, [0.25] * 4, (0.3, 0.2)))
    watch.add(load([0.25] * 4, [0.25] * 4, (0.5, 0.2)))
    scalars = watch.report().scalars
    assert scalars["routing/layer_0/dropped"] == scalars["routing/dropped"] == pytest.approx(0.3)
    assert scalars["routing/layer_1/dropped"] == pytest.approx(0.2)
