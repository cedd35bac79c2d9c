"""Clusters of sequences, and the importance of neurons against finite differences and explicit autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.errors import UpcycleError
from bam_ray.families import FAMILIES, Role
from bam_ray.upcycling.split import importance
from bam_ray.upcycling.split.importance import cluster_sequences, neuron_importance
from tests.support import tiny

PROJECTIONS = [f"model.layers.{layer}.mlp.down_proj" for layer in range(tiny.SIZES["num_hidden_layers"])]


def projections(family: str) -> list[str]:
    parameters = FAMILIES[family].parameters(tiny.CONFIGS[family].to_dict())
    return [parameter.name.removesuffix(".weight") for parameter in parameters if parameter.role is Role.DOWN]


def loss(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Return the sum of all next-token losses."""
    logits = model(rows).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_importance_equals_explicit_autograd(family: str) -> None:
    model = tiny.dense(family, 0)
    groups = [tiny.tokens(3, 9, seed=1), tiny.tokens(2, 13, seed=2)]
    names = projections(family)
    found = neuron_importance(model, names, groups)
    assert found.shape == (2, 2, tiny.SIZES["intermediate_size"])
    for layer, name in enumerate(names):
        for number, rows in enumerate(groups):
            kept: list[Tensor] = []
            hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
            with hook:
                total = loss(model, rows)
            (gradient,) = torch.autograd.grad(total, kept[0])
            expected = (kept[0] * gradient).abs().mean((0, 1)).double()
            torch.testing.assert_close(found[layer, number], expected, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_importance_equals_finite_differences() -> None:
    """Scaling a neuron of one token by (1 + ε) changes the loss by ε·h·∂L/∂h."""
    model = tiny.dense("llama", 0).double()
    rows = tiny.tokens(1, 5, seed=3)
    found = neuron_importance(model, PROJECTIONS, [rows])
    epsilon = 1e-2  # a larger step than usual, because norms round to single precision
    for layer, neuron in ((0, 7), (1, 30)):
        total = 0.0
        for token in range(5):
            changed = []
            for factor in (1.0 + epsilon, 1.0 - epsilon):

                def scale(_: object, args: tuple[Tensor], factor: float = factor, token: int = token) -> tuple[Tensor]:
                    hidden = args[0].clone()
                    hidden[0, token, neuron] *= factor  # noqa: B023
                    return (hidden,)

                with model.get_submodule(PROJECTIONS[layer]).register_forward_pre_hook(scale):
                    changed.append(loss(model, rows).item())
            total += abs(changed[0] - changed[1]) / (2 * epsilon)
        assert found[layer, 0, neuron].item() == pytest.approx(total / 5, rel=1e-3)


def test_batch_size_has_no_effect_and_the_model_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.dense("cohere", 0).train()
    frozen = model.model.norm.weight.requires_grad_(False)
    rows = tiny.tokens(5, 8)
    whole = neuron_importance(model, PROJECTIONS, [rows])
    monkeypatch.setattr(importance, "BATCH_TOKENS", 17)  # batches of two, two and one rows
    torch.testing.assert_close(neuron_importance(model, PROJECTIONS, [rows]), whole, atol=1e-7, rtol=1e-5)
    clusters = cluster_sequences(model, rows, 5, seed=0)
    assert len(clusters) == 5
    assert model.training and not frozen.requires_grad
    assert sum(not parameter.requires_grad for parameter in model.parameters()) == 1
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["cohere", "gpt_neox", "llama", "qwen3"])
def test_sequences_of_the_same_words_form_a_cluster(family: str) -> None:
    model = tiny.dense(family, 0)
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.randint(start, start + 6, (4, 24), generator=generator) for start in (10, 40, 70)]
    rows = torch.stack(kinds, dim=1).flatten(0, 1)  # interleaved
    groups = cluster_sequences(model, rows, 3, seed=0)
    assert sorted(group.tolist() for group in groups) == sorted(kind.tolist() for kind in kinds)
    again = cluster_sequences(model, rows, 3, seed=0)
    assert all(torch.equal(one, other) for one, other in zip(groups, again, strict=True))


def test_unequal_groups_are_refused() -> None:
    with pytest.raises(UpcycleError, match=r"10 sequences cannot be divided into 3 groups .* 1, 2, 5, 10$"):
        cluster_sequences(tiny.dense("llama", 0), tiny.tokens(10, 4), 3, seed=0)
