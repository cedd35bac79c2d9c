"""Routers that are fitted to text: they separate domains on held-out rows, and the whole model has the same scores."""

import gc
import io
from collections import Counter
from functools import partial
from typing import Any, Literal

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bam_ray.errors import UpcycleError
from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.routing_bam import BamRouter
from bam_ray.upcycling.routers.initialize import draw_router, fit_routers, split_rows
from bam_ray.upcycling.routers.rows import (
    RIDGES,
    Assignment,
    domain_rows,
    fit_router,
    generator,
    router_logits,
)
from bam_ray.upcycling.routers.separation import Separation, separation_table
from tests.support import tiny

NAMES = ["seed", "code", "law"]
MIXTURES: dict[str, dict[str, Any]] = {
    "parallel kv_experts": {"attention_experts": "kv_experts"},
    "parallel kv_shared": {"attention_experts": "kv_shared", "num_experts_per_tok": 2, "norm_topk_prob": True},
    "sequential kv_experts": {"parallel_block": False, "norm_type": "rmsnorm", "rope_interleaved": False},
    "sequential kv_shared": {"parallel_block": False, "attention_experts": "kv_shared"},
    "sequential averaged": {"parallel_block": False, "norm_type": "rmsnorm", "attention_experts": "averaged"},
    "a dense layer": {"dense_layers": [0], "parallel_block": False},
    "prefix": {"router_input": "prefix"},
    "embedding experts": {"embeddings": "experts"},
    "forgetting": {"router_input": "prefix", "router_forgetting": 0.9},
    "both, untied": {"embeddings": "experts", "router_input": "prefix", "tie_word_embeddings": False},
}


def mixture(names: list[str] = NAMES, **settings: Any) -> tuple[BamConfig, dict[str, Tensor]]:
    """Return the configuration of a random mixture, and its tensors without routers."""
    config = BamConfig(
        **tiny.SIZES | {"hidden_size": 64, "initializer_range": 0.1},
        num_experts=len(names),
        expert_names=names,
        **settings,
    )
    torch.manual_seed(0)
    state = BamForCausalLM(config).state_dict()
    return config, {name: value for name, value in state.items() if not name.endswith(".gate.weight")}


def texts(names: list[str] = NAMES, rows: int = 24, length: int = 16) -> dict[str, Tensor]:
    """Return rows of each domain, in which its own third of the tokens is 20 times as frequent; shapes differ."""
    found = {}
    for number, name in enumerate(names):
        weights = torch.ones(tiny.SIZES["vocab_size"])
        weights[number::3] = 20.0
        generator = torch.Generator().manual_seed(number)
        found[name] = weights.expand(rows + 4 * number, -1).multinomial(length + number, True, generator=generator)
    return found


def whole_model(config: BamConfig, tensors: dict[str, Tensor]) -> BamForCausalLM:
    """Return the mixture with these tensors in memory."""
    model = BamForCausalLM(config).eval()
    problems = model.load_state_dict(tensors, strict=False)
    assert not problems.unexpected_keys
    assert set(problems.missing_keys) <= {"lm_head.weight", "lm_head.experts.weight"}
    return model


def router_key(name: str) -> tuple[int | None, str]:
    """Return the layer and the kind of the router module `name`."""
    if name in ("model.embed_tokens.gate", "model.head.gate"):
        return None, "embedding" if "embed" in name else "head"
    return int(name.split(".")[2]), "attention" if "self_attn" in name else "ffn"


def keep_logits(
    found: dict[tuple[int | None, str], Tensor], key: tuple[int | None, str], _: nn.Module, __: Any, logits: Tensor
) -> None:
    found[key] = logits


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("how", ["means", "ridge"])
@torch.no_grad()
def test_reported_scores_are_those_of_the_whole_model(name: str, how: Literal["means", "ridge"]) -> None:
    config, tensors = mixture(**MIXTURES[name])
    text = texts()
    routers, separation = fit_routers(config, tensors.__getitem__, text, how, seed=3)
    model = whole_model(config, tensors | routers)
    assert tensors.keys() | routers.keys() == model.state_dict().keys()
    logits: dict[tuple[int | None, str], Tensor] = {}
    for full_name, module in model.named_modules():
        if isinstance(module, BamRouter):
            module.register_forward_hook(partial(keep_logits, logits, router_key(full_name)))

    kinds = ("attention", "ffn") if config.attention_experts != "averaged" else ("ffn",)
    reported = {(router.layer, router.kind): router.scores for router in separation.routers}
    dense = getattr(config, "dense_layers", None) or ()
    layers = [layer for layer in range(config.num_hidden_layers) if layer not in dense]
    order: list[tuple[int | None, str]] = [(layer, kind) for layer in layers for kind in kinds]
    if config.embeddings == "experts":
        order = [(None, "embedding"), *order, (None, "head")]
    assert list(reported) == order
    accuracy: Counter[tuple[int | None, str]] = Counter()
    cross_entropy: Counter[tuple[int | None, str]] = Counter()
    for expert, domain in enumerate(NAMES):
        _, held_out = split_rows(domain, len(text[domain]), 0.25, seed=3)
        model(text[domain][held_out])
        for key, part in logits.items():
            accuracy[key] += (part.argmax(-1) == expert).double().mean().item() / 3
            cross_entropy[key] -= part.log_softmax(-1)[..., expert].double().mean().item() / 3
    for key, scores in reported.items():
        assert scores[how].accuracy == pytest.approx(accuracy[key], abs=1e-9)
        assert scores[how].cross_entropy == pytest.approx(cross_entropy[key], abs=1e-4)


@pytest.mark.parametrize("name", MIXTURES)
def test_fitted_routers_separate_domains_and_random_ones_do_not(name: str) -> None:
    config, tensors = mixture(**MIXTURES[name])
    _, separation = fit_routers(config, tensors.__getitem__, texts(rows=40), "ridge", seed=0)
    assert separation.chance.accuracy == pytest.approx(1 / 3)
    for router in separation.routers:
        random = router.scores["random"]
        for how in ("means", "ridge"):
            score = router.scores[how]
            assert score.accuracy > max(random.accuracy + 0.15, 0.6)
            assert score.probability > random.probability + 0.1
            assert score.cross_entropy < min(random.cross_entropy, separation.chance.cross_entropy) - 0.2
    by_chance = sum(router.scores["random"].accuracy for router in separation.routers) / len(separation.routers)
    assert by_chance < 0.45


def test_only_one_layer_is_in_memory() -> None:
    config, tensors = mixture(parallel_block=False)
    order: list[str] = []
    storages: list[tuple[str, int, torch.Size]] = []

    def read(name: str) -> Tensor:
        layer = name.split(".")[2] if ".layers." in name else ""
        if layer == "1" and not any(".layers.1." in earlier for earlier in order):
            gc.collect()
            tensors_alive = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
            # Other tests may have left packed tensors, which have no storage
            alive = {(each.data_ptr(), each.shape) for each in tensors_alive if each.layout == torch.strided}
            assert storages
            assert [earlier for earlier, *storage in storages if tuple(storage) in alive] == []
        order.append(name)
        tensor = tensors[name].clone()
        if layer == "0":
            storages.append((name, tensor.data_ptr(), tensor.shape))
        return tensor

    done: list[tuple[int, int]] = []
    fit_routers(config, read, texts(), "ridge", seed=0, progress=lambda *step: done.append(step))
    assert done == [(0, 2), (1, 2), (2, 2)]
    assert len(set(order)) == len(order)
    assert set(order) == tensors.keys() - {"model.norm.weight", "lm_head.weight"}
    assert order[0] == "model.embed_tokens.weight"
    layers = [int(name.split(".")[2]) for name in order[1:]]
    assert layers == sorted(layers)


def test_progress_counts_the_routers_of_embedding_experts() -> None:
    config, tensors = mixture(embeddings="experts")
    done: list[tuple[int, int]] = []
    fit_routers(config, tensors.__getitem__, texts(), "means", seed=0, progress=lambda *step: done.append(step))
    assert done == [(number, 4) for number in range(5)]


def test_the_seed_determines_the_routers() -> None:
    config, tensors = mixture()
    text = texts()
    one, reported = fit_routers(config, tensors.__getitem__, text, "ridge", seed=1)
    same, again = fit_routers(config, tensors.__getitem__, text, "ridge", seed=1)
    other, _ = fit_routers(config, tensors.__getitem__, text, "ridge", seed=2)
    assert reported == again
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_copies_share_rows_and_experts_without_text_have_zeros() -> None:
    names = ["seed", "code", "code-2", "law", "gpt-2"]
    config, tensors = mixture(names)
    text = dict(
        zip(["law", "code", "gpt-2"], texts().values(), strict=True)
    )  # gpt-2 has the name of a copy, but its own text
    routers, separation = fit_routers(config, tensors.__getitem__, text, "means", seed=0)
    for weight in routers.values():
        assert not weight[0].any()
        distance = (weight[2] - weight[1]).norm() / weight[1].norm()
        assert 0.001 < distance < 0.05
        assert (weight[4] - weight[1]).norm() > weight[1].norm()
    # For a token of code two of the five experts are right, for the others one
    assert separation.chance.accuracy == pytest.approx((1 / 5 + 2 / 5 + 1 / 5) / 3)
    assert min(router.scores["means"].accuracy for router in separation.routers) > 2 * separation.chance.accuracy


def test_routers_have_the_dtype_of_the_mixture() -> None:
    config, tensors = mixture()
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    routers, separation = fit_routers(config, halves.__getitem__, texts(), "ridge", seed=0)
    assert {weight.dtype for weight in routers.values()} == {torch.bfloat16}
    assert all(router.scores["ridge"].accuracy > 0.55 for router in separation.routers)


def inputs() -> list[Tensor]:
    """Return different numbers of inputs of three domains, whose means are far from zero."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 8, generator=generator) + 5.0
    return [
        center + torch.randn(rows, 8, generator=generator) for center, rows in zip(centers, (40, 60, 90), strict=True)
    ]


def test_ridge_is_weighted_least_squares_on_centered_labels() -> None:
    parts = inputs()
    x = torch.cat(parts).double()
    weight = torch.cat([torch.full((len(part), 1), 1 / (3 * len(part)), dtype=torch.double) for part in parts])
    labels = torch.eye(3, dtype=torch.double).repeat_interleave(torch.tensor([len(part) for part in parts]), 0) - 1 / 3
    targets = torch.cat([weight.sqrt() * labels, torch.zeros(8, 3, dtype=torch.double)])
    for relative, rows in zip(RIDGES, domain_rows(parts)["ridge"], strict=True):
        ridge = relative * (weight * x.square()).sum() / 8
        augmented = torch.cat([weight.sqrt() * x, ridge.sqrt() * torch.eye(8, dtype=torch.double)])
        torch.testing.assert_close(rows / 3, torch.linalg.lstsq(augmented, targets).solution.T)


def test_means_have_no_component_that_all_domains_share() -> None:
    (rows,) = domain_rows(inputs())["means"]
    center = torch.stack([part.double().mean(0) for part in inputs()]).mean(0)
    torch.testing.assert_close(rows @ center, torch.zeros(3, dtype=torch.double))
    torch.testing.assert_close(rows.sum(0), torch.zeros(8, dtype=torch.double))


@pytest.mark.parametrize("how", ["means", "ridge"])
def test_calibration_minimizes_the_cross_entropy(how: Literal["means", "ridge"]) -> None:
    parts = inputs()
    assignment = Assignment(("a", "b", "c"), torch.arange(3), torch.eye(3, dtype=torch.bool))
    best = assignment.calibrated(domain_rows(parts)[how][0], parts)

    def cross_entropy(factor: float) -> float:
        return assignment.score([router_logits(part, best * factor) for part in parts]).cross_entropy

    assert all(cross_entropy(1.0) < cross_entropy(factor) for factor in (0.01, 0.5, 0.95, 1.05, 2.0, 100.0))


def test_little_text_does_not_make_routers_overconfident() -> None:
    """In 128 dimensions, 90 tokens of noise are separable. On other tokens the router must not be worse than chance."""
    draw = torch.Generator().manual_seed(0)
    fit, held_out = ([torch.randn(rows, 128, generator=draw) for _ in range(3)] for rows in (30, 1000))
    assignment = Assignment(("a", "b", "c"), torch.arange(3), torch.eye(3, dtype=torch.bool))
    for weight in fit_router(assignment, fit, lambda: generator(0)).values():
        score = assignment.score([router_logits(part, weight) for part in held_out])
        assert score.cross_entropy < assignment.chance().cross_entropy + 0.05
    naive = assignment.calibrated(domain_rows(fit)["ridge"][0], fit)
    score = assignment.score([router_logits(part, naive) for part in held_out])
    assert score.cross_entropy > assignment.chance().cross_entropy + 1.0


def test_separation_as_json_and_as_a_narrow_table() -> None:
    config, tensors = mixture()
    _, separation = fit_routers(config, tensors.__getitem__, texts(), "means", seed=0)
    assert Separation.model_validate_json(separation.to_json()) == separation
    assert separation.fit_tokens == 18 * 16 + 21 * 17 + 24 * 18
    assert separation.held_out_tokens == 6 * 16 + 7 * 17 + 8 * 18
    console = Console(file=io.StringIO(), width=200)
    console.print(separation_table(separation))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) < 60
    score = separation.routers[0].scores["means"]
    assert any("means *" in line for line in lines)
    assert any(f"{score.accuracy:.0%} {score.cross_entropy:.2f}" in line for line in lines)
    assert any("chance: 33% 1.10" in line for line in lines)


def test_unusable_texts_are_refused() -> None:
    config, tensors = mixture()
    text = texts()

    def refusal(**given: Tensor) -> str:
        with pytest.raises(UpcycleError) as caught:
            fit_routers(config, tensors.__getitem__, given, "ridge", seed=0)
        return str(caught.value)

    assert "only text for ['code']: give text of two or more of ['seed', 'code', 'law']" in refusal(code=text["code"])
    assert "text for 'medicine', but no such expert" in refusal(code=text["code"], medicine=text["law"])
    assert "'law' has 1 rows: give at least 2" in refusal(code=text["code"], law=text["law"][:1])


def test_random_routers_have_the_configured_deviation() -> None:
    config, _ = mixture()
    drawn = draw_router("model.layers.0.mlp.gate.weight", config, 0)
    assert drawn.shape == (3, 64)
    assert drawn.std().item() == pytest.approx(0.1, rel=0.2)
    assert not torch.equal(drawn, draw_router("model.layers.1.mlp.gate.weight", config, 0))
