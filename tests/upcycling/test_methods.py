"""Properties of upcycled mixtures of every method and family."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from bam_ray.errors import SettingsError, UpcycleError
from bam_ray.families import FAMILIES
from bam_ray.model import BamConfig
from bam_ray.settings import Losses, Ramp, RoutedMixture, RouterSettings, mixture_settings
from bam_ray.upcycling import DomainText, plan
from bam_ray.upcycling.methods import experts_of
from tests.support import tiny
from tests.support.mixture_folders import CASES, NAMES, SEED_ONLY_CASES, branches, load, mixture, settings, upcycle_into

TEXTS = {"general": tiny.tokens(16, 20, seed=1)}


def test_every_family_is_tested() -> None:
    assert set(tiny.CONFIGS) >= set(FAMILIES)


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_identical_branches_reproduce_the_seed(tmp_path: Path, family: str, case: str) -> None:
    seed = tiny.dense(family, 0)
    model = mixture(tmp_path, dict.fromkeys(NAMES, seed), settings(case))
    ids = tiny.tokens()
    torch.testing.assert_close(model(ids).logits, seed(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("case", SEED_ONLY_CASES)
@torch.no_grad()
def test_mixtures_of_the_seed_alone_reproduce_it(tmp_path: Path, family: str, case: str) -> None:
    """Sparse copies reproduce the seed, and so do all slices of a split that has each neuron exactly once."""
    if case == "split groups" and family == "olmo2":
        pytest.skip("OLMo2 has query/key norms over all heads, so attention cannot be split")
    seed = tiny.dense(family, 0)
    chosen = settings(case)
    assert isinstance(chosen, RoutedMixture)
    if chosen.method == "split":  # all slices are active once: the softmax of a zero router is 1/N, so the scale is N
        experts = chosen.num_experts
        assert experts is not None
        changes = {"num_experts_per_tok": experts, "norm_topk_prob": False, "ffn_output_scale": float(experts)}
        chosen = chosen.model_copy(update=changes)
    chosen = chosen.model_copy(update={"router": RouterSettings(init="zero")})
    model = mixture(tmp_path, {"seed": seed}, chosen, TEXTS)
    ids = tiny.tokens()
    close = torch.allclose(model(ids).logits, seed(ids).logits, atol=1e-5, rtol=1e-5)
    assert close == (case not in ("split inner", "split inter"))  # these assign a neuron to several experts or to none


@torch.no_grad()
def test_a_split_with_a_shared_expert(tmp_path: Path) -> None:
    """If all groups have the same important neurons, the shared expert has them, and the experts have the same size."""
    seed = tiny.dense("llama", 0)
    chosen = settings("split inter", num_experts=2, split={"construction": "inter", "shared_neurons": 8})
    mixture(tmp_path, {"seed": seed}, chosen, {"a": TEXTS["general"], "b": TEXTS["general"]})
    partition = json.loads((tmp_path / "mixture" / "partition.json").read_text())
    assert [len(layer["shared"]) for layer in partition] == [8, 8]
    assert [len(expert) for layer in partition for expert in layer["experts"]] == [20] * 4
    assert all(not set(layer["shared"]) & set(layer["experts"][0]) for layer in partition)


def test_the_configuration_has_the_final_loss_coefficients(tmp_path: Path) -> None:
    falling = Losses(load_balance=Ramp(start=0.1, end=0.02), router_z=Ramp(start=0.01, end=0.002))
    config = plan(tiny.sources(tmp_path, branches()), settings(), falling, DomainText()).config
    assert isinstance(config, BamConfig)
    assert (config.router_aux_loss_coef, config.router_z_loss_coef) == (0.02, 0.002)


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("expert", range(3))
@torch.no_grad()
def test_routing_to_one_expert_reproduces_its_branch(tmp_path: Path, family: str, expert: int) -> None:
    """If branches differ only in attention and FFN, a mixture whose routers choose one expert equals its branch."""
    models = {name: tiny.dense(family, seed) for seed, name in enumerate(NAMES[:3])}
    with torch.no_grad():
        for name, value in models["seed"].named_parameters():
            inner = any(part in name for part in ("self_attn", "mlp.", "attention."))
            if not inner:
                for model in models.values():
                    model.get_parameter(name).copy_(value)
    mixed = mixture(tmp_path, models, settings("bam kv_experts", num_experts_per_tok=1))
    for layer in mixed.model.layers:
        for gate in (layer.mlp.gate, layer.self_attn.gate):
            gate.register_forward_hook(lambda _, __, logits: one_hot_logits(logits, expert))
    ids = tiny.tokens()
    torch.testing.assert_close(mixed(ids).logits, models[NAMES[expert]](ids).logits, atol=1e-5, rtol=1e-5)


def one_hot_logits(logits: torch.Tensor, expert: int) -> torch.Tensor:
    result = torch.full_like(logits, -1e4)
    result[..., expert] = 0.0
    return result


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_order_of_branches_has_no_effect(tmp_path: Path, case: str) -> None:
    models = {name: tiny.dense("cohere", seed) for seed, name in enumerate(NAMES)}
    order = [0, 3, 1, 2]
    one = mixture(tmp_path / "a", models, settings(case))
    other = mixture(tmp_path / "b", {NAMES[i]: models[NAMES[i]] for i in order}, settings(case))
    for layer, permuted in zip(one.model.layers, other.model.layers, strict=True):
        permuted.mlp.gate.weight.copy_(layer.mlp.gate.weight[order])
        if case != "btx":
            permuted.self_attn.gate.weight.copy_(layer.self_attn.gate.weight[order])
    ids = tiny.tokens()
    torch.testing.assert_close(one(ids).logits, other(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_top_1_without_normalization_shrinks_the_ffn(tmp_path: Path) -> None:
    """The paper's gates do not preserve the seed's function. With a zero router, the output scale N does."""
    seed = tiny.dense("cohere", 0)
    ids = tiny.tokens()
    for scale in (1.0, 4.0):
        chosen = settings(num_experts_per_tok=1, norm_topk_prob=False, ffn_output_scale=scale, router={"init": "zero"})
        model = mixture(tmp_path / str(scale), dict.fromkeys(NAMES, seed), chosen)
        assert torch.allclose(model(ids).logits, seed(ids).logits, atol=1e-5, rtol=1e-5) == (scale == 4.0)


@torch.no_grad()
def test_dense_layers_are_the_mean_of_all_models(tmp_path: Path) -> None:
    models = branches()
    model = mixture(tmp_path, models, settings(dense_layers=[1]))
    assert model.config.dense_layers == [1]
    out = model(tiny.tokens(), output_router_logits=True)
    assert len(out.router_logits) == len(out.attention_router_logits) == 1
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        mean = sum(each.model.layers[1].get_submodule(name).weight for each in models.values()) / 3
        torch.testing.assert_close(model.model.layers[1].get_submodule(name).weight, mean)


@torch.no_grad()
def test_additional_experts_are_copies_of_the_seed(tmp_path: Path) -> None:
    models = branches()
    model = mixture(tmp_path, models, settings(num_experts=5, redraw_fraction=0.5))
    assert model.config.expert_names == ["seed", "code", "law", "seed-2", "seed-3"]
    down = model.model.layers[0].mlp.experts.down_proj
    seed = models["seed"].model.layers[0].mlp.down_proj.weight
    assert torch.equal(down[0], seed)  # the seed's own expert is not redrawn
    for copy in (down[3], down[4]):  # half of the neurons are kept, different ones in each copy
        assert int((copy == seed).all(0).sum()) == 24
    assert not torch.equal(down[3], down[4])
    gate_up = model.model.layers[0].mlp.experts.gate_up_proj
    gate = models["seed"].model.layers[0].mlp.gate_proj.weight
    kept = (gate_up[3, :48] == gate).all(1)
    assert torch.equal(kept, (down[3] == seed).all(0))  # the same neurons in all matrices of an expert
    mean = sum(each.model.norm.weight for each in models.values()) / 3  # copies do not count in the mean
    torch.testing.assert_close(model.model.norm.weight, mean)


@torch.no_grad()
def test_weights_of_the_mean_are_used_and_recorded(tmp_path: Path) -> None:
    models = branches()
    model = mixture(tmp_path, models, settings("btx", average={"weights": {"code": 3.0, "law": 0.0}}))
    want = (models["seed"].model.norm.weight + 3 * models["code"].model.norm.weight) / 4
    torch.testing.assert_close(model.model.norm.weight, want)
    lineage = json.loads((tmp_path / "mixture" / "lineage.json").read_text())
    assert lineage["tensors"]["model.norm.weight"]["weights"] == [1.0, 3.0, 0.0]
    with pytest.raises(UpcycleError, match=r"average\.weights names \['poetry'\], which are not among the models"):
        upcycle_into(tmp_path / "x", tiny.sources(tmp_path, models), settings(average={"weights": {"poetry": 1.0}}))


@torch.no_grad()
def test_ties_keeps_the_largest_changes_that_agree_in_sign(tmp_path: Path) -> None:
    models: dict[str, PreTrainedModel] = {name: tiny.dense("llama", 0) for name in NAMES[:3]}
    models["code"].model.norm.weight[:3] += torch.tensor([1.0, 0.5, 0.25])
    models["law"].model.norm.weight[:3] += torch.tensor([-0.5, 1.5, 0.125])
    seed = models["seed"].model.norm.weight
    # Two of 32 elements are kept: 1.0 and 0.5 of code, -0.5 and 1.5 of law
    model = mixture(tmp_path, models, settings("btx", average={"how": "ties", "density": 2 / 32}))
    change = torch.zeros(32)
    change[:2] = torch.tensor([1.0, 1.0])  # 1.0 wins against -0.5; the mean of 0.5 and 1.5
    torch.testing.assert_close(model.model.norm.weight, seed + change)


@torch.no_grad()
def test_bf16_means_are_computed_in_fp32(tmp_path: Path) -> None:
    models = {name: model.bfloat16() for name, model in branches().items()}
    upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, models), settings("btx"))
    model = load(tmp_path / "mixture")
    assert model.dtype == torch.bfloat16
    mean = sum(each.model.norm.weight.float() for each in models.values()) / 3
    assert torch.equal(model.model.norm.weight, mean.bfloat16())


def test_sources_are_converted_to_the_dtype_of_the_seed(tmp_path: Path) -> None:
    models = branches()
    models["seed"] = models["seed"].bfloat16()
    models["code"] = models["code"].half()
    upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, models), settings())
    model = load(tmp_path / "mixture")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    want = models["law"].model.layers[0].mlp.down_proj.weight.bfloat16()
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj[2], want)


def test_the_lineage_has_an_origin_for_every_tensor(tmp_path: Path) -> None:
    models = {name: tiny.dense("cohere", seed) for seed, name in enumerate(NAMES)}
    model = mixture(tmp_path, models, settings("bam kv_shared"))
    lineage = json.loads((tmp_path / "mixture" / "lineage.json").read_text())
    assert set(lineage["tensors"]) == {name for name, _ in model.named_parameters()}
    assert list(lineage["sources"]) == NAMES
    assert model.config.expert_names == NAMES
    key = lineage["tensors"]["model.layers.0.self_attn.attention_experts.k_proj"]
    takes = [{"take": f"{name}:model.layers.0.self_attn.k_proj.weight"} for name in NAMES]
    assert key == {"stack": [{"mean": takes}]}
    mean = sum(each.model.layers[0].self_attn.k_proj.weight for each in models.values()) / 4
    torch.testing.assert_close(model.model.layers[0].self_attn.attention_experts.k_proj[0], mean)


@torch.no_grad()
def test_fitted_routers_are_written_and_reported(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = {
        name: torch.randint(2 + 4 * number, 6 + 4 * number, (8, 16), generator=generator)
        for number, name in enumerate(NAMES[:3])
    }
    upcycled = upcycle_into(
        tmp_path / "mixture", tiny.sources(tmp_path, branches()), settings(router={"init": "ridge"}), texts
    )
    model = load(tmp_path / "mixture")
    assert upcycled.separation is not None
    scores = upcycled.separation.routers[0].scores
    assert scores["ridge"].accuracy > 0.9 > scores["random"].accuracy
    assert (tmp_path / "mixture" / "separation.json").is_file()
    assert len(list((tmp_path / "mixture").glob("model-*.safetensors"))) == 2  # the routers have their own shard
    out = model(torch.cat(list(texts.values())), output_router_logits=True)
    expected = torch.arange(3).repeat_interleave(8 * 16)
    assert (out.router_logits[0].argmax(-1) == expected).float().mean() > 0.9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "sparse"}, "set num_experts"),
        ({"method": "split", "num_experts": 4, "redraw_fraction": 0.5}, "redraw_fraction: unknown key"),
        ({"method": "bam", "split": {"attention": "groups"}}, "split: unknown key"),
        ({"method": "sparse", "num_experts": 4, "router": {"init": "ridge"}}, "separates domains"),
        ({"method": "btx", "average": {"how": "ties", "weights": {"code": 1.0}}}, "weights apply only to how: mean"),
        ({"method": "btx", "dense_layers": [-1]}, "greater than or equal to 0"),
        ({"method": "sparse", "num_experts": 4, "same_seed": False}, "same_seed: unknown key"),
        ({"method": "btx", "attention_experts": "kv_shared"}, "attention_experts: unknown key"),
        ({"method": "soup", "num_experts": 4}, "num_experts: unknown key"),
        ({"method": "soup", "router": {"init": "zero"}}, "router: unknown key"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        mixture_settings(given)


def test_branches_of_another_seed_are_refused(tmp_path: Path) -> None:
    models = {"seed": tiny.dense("llama", 0), "code": tiny.dense("llama", 0), "law": tiny.dense("llama", 1)}
    with torch.no_grad():
        for parameter in models["code"].parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std())  # far away, but descended from the seed
    sources = tiny.sources(tmp_path, models)
    with pytest.raises(
        UpcycleError, match=r"law: model.layers.0.mlp.up_proj.weight of 'law' does not descend from 'seed'"
    ):
        upcycle_into(tmp_path / "out", sources, settings(same_seed=True))
    upcycle_into(tmp_path / "out", {name: sources[name] for name in ("seed", "code")}, settings(same_seed=True))


def test_settings_that_do_not_fit_the_models_are_refused(tmp_path: Path) -> None:
    sources = tiny.sources(tmp_path, branches())
    seed = {"seed": sources["seed"]}
    for given, readers, message in (
        (settings(num_experts=2), sources, "num_experts is 2, fewer than the 3 models"),
        (settings(num_experts_per_tok=4), sources, "num_experts_per_tok is 4: there are 3 experts"),
        (settings(dense_layers=[2]), sources, "dense_layers names layer 2: the model has layers 0 to 1"),
        (settings(), seed, "method bam needs branches"),
        (settings("sparse"), sources, "makes all experts from the seed"),
        (settings("split", num_experts=5), seed, "48"),
        (settings("split groups", num_experts=4), seed, r"2 groups of key/value heads.*use num_experts of \[1, 2\]"),
        (settings(router={"init": "ridge"}), sources, "give some of each domain"),
        (settings("split inner"), seed, "give some of each domain"),
    ):
        with pytest.raises(UpcycleError, match=message):
            upcycle_into(tmp_path / "out", readers, given)
    assert not (tmp_path / "out").exists()


def test_copies_of_the_seed_are_numbered() -> None:
    sparse = settings("sparse")
    assert isinstance(sparse, RoutedMixture)
    assert [expert.name for expert in experts_of(["seed"], sparse)] == ["seed", "seed-2", "seed-3", "seed-4"]
