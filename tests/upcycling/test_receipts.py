"""What must hold of every upcycled mixture, by method and family."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bam_ray.errors import BamError, FamilyError, UpcycleError
from bam_ray.model import BamForCausalLM
from bam_ray.settings import MixtureSettings
from bam_ray.upcycling import METHODS, upcycle

FAMILIES = sorted(tiny.CONFIGS)
EXPERTS = re.compile(r"\.(self_attn|attention|mlp)\.")  # what becomes experts: the rest is averaged
NAMES = ["seed", "code", "law", "medicine"]


def settings(method: str, attention: str, top_k: int = 2, **more: object) -> MixtureSettings:
    chosen = {"attention_experts": attention} if method == "bam" else {}
    return MixtureSettings.model_validate(
        {"method": method, "num_experts_per_tok": top_k, "norm_topk_prob": True, **chosen, **more}
    )


def mixture(folder: Path, models: dict[str, PreTrainedModel], settings: MixtureSettings) -> BamForCausalLM:
    out = folder / "mixture"
    out.mkdir()
    upcycle(tiny.sources(folder, models), settings, out)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    model: BamForCausalLM = loaded.eval()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "attention"), METHODS)
@torch.no_grad()
def test_identical_branches_reproduce_the_seed(tmp_path: Path, family: str, method: str, attention: str) -> None:
    seed = tiny.dense(family, 0)
    model = mixture(tmp_path, dict.fromkeys(NAMES, seed), settings(method, attention))
    ids = tiny.tokens()
    torch.testing.assert_close(model(ids).logits, seed(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("expert", range(3))
@torch.no_grad()
def test_one_hot_routing_with_equal_shared_parameters_is_that_branch(tmp_path: Path, family: str, expert: int) -> None:
    """Branches that differ in attention and FFN alone: with the gates on one expert, the mixture is that branch."""
    models = {name: tiny.dense(family, seed) for seed, name in enumerate(NAMES[:3])}
    shared = {name: value for name, value in models["seed"].state_dict().items() if not EXPERTS.search(name)}
    for model in models.values():
        model.load_state_dict(shared, strict=False)
    mixed = mixture(tmp_path, models, settings("bam", "kv_experts", top_k=1))
    # Norms are positive-scaled but centred inputs sum to 0, so no weight gives a constant logit: set them directly
    for layer in mixed.model.layers:
        for gate in (layer.mlp.gate, layer.self_attn.gate):
            gate.register_forward_hook(lambda _, __, logits: one_hot_logits(logits, expert))
    ids = tiny.tokens()
    torch.testing.assert_close(mixed(ids).logits, models[NAMES[expert]](ids).logits, atol=1e-5, rtol=1e-5)


def one_hot_logits(logits: torch.Tensor, expert: int) -> torch.Tensor:
    result = torch.full_like(logits, -1e4)
    result[..., expert] = 0.0
    return result


@pytest.mark.parametrize(("method", "attention"), METHODS)
@torch.no_grad()
def test_order_of_branches_does_not_matter(tmp_path: Path, method: str, attention: str) -> None:
    models = {name: tiny.dense("cohere", seed) for seed, name in enumerate(NAMES)}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    order = [0, 3, 1, 2]
    one = mixture(tmp_path / "a", models, settings(method, attention))
    other = mixture(tmp_path / "b", {NAMES[i]: models[NAMES[i]] for i in order}, settings(method, attention))
    for layer, permuted in zip(one.model.layers, other.model.layers, strict=True):
        permuted.mlp.gate.weight.copy_(layer.mlp.gate.weight[order])
        if method == "bam":
            permuted.self_attn.gate.weight.copy_(layer.self_attn.gate.weight[order])
    ids = tiny.tokens()
    torch.testing.assert_close(one(ids).logits, other(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_raw_top_1_shrinks_the_ffn(tmp_path: Path) -> None:
    """The paper's gate is not function-preserving; the output scale N makes it so for a zero router."""
    seed = tiny.dense("cohere", 0)
    ids = tiny.tokens()
    for number, scale in enumerate((1.0, 4.0)):
        (tmp_path / str(number)).mkdir()
        wanted = settings("bam", "kv_experts", top_k=1, norm_topk_prob=False, ffn_output_scale=scale)
        model = mixture(tmp_path / str(number), dict.fromkeys(NAMES, seed), wanted)
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
        close = torch.allclose(model(ids).logits, seed(ids).logits, atol=1e-5, rtol=1e-5)
        assert close == (scale == 4.0)


def test_lineage_names_an_origin_for_every_tensor(tmp_path: Path) -> None:
    models = {name: tiny.dense("cohere", seed) for seed, name in enumerate(NAMES)}
    model = mixture(tmp_path, models, settings("bam", "kv_shared"))
    lineage = json.loads((tmp_path / "mixture" / "lineage.json").read_text())
    assert set(lineage["tensors"]) == {name for name, _ in model.named_parameters()}
    assert list(lineage["sources"]) == NAMES
    assert model.config.expert_names == NAMES
    key = lineage["tensors"]["model.layers.0.self_attn.experts.k_proj"]
    assert key == {"operation": "average", "inputs": ["model.layers.0.self_attn.k_proj.weight"]}
    mean = sum(each.state_dict()[key["inputs"][0]] for each in models.values()) / 4
    torch.testing.assert_close(model.model.layers[0].self_attn.experts.k_proj[0], mean)


def test_sources_that_do_not_fit_are_named(tmp_path: Path) -> None:
    models = {"seed": tiny.dense("cohere", 0), "code": tiny.dense("cohere", 1)}
    wanted = settings("bam", "kv_experts")

    def refusal(kind: type[BamError]) -> str:
        folder = tmp_path / "refused"
        folder.mkdir(exist_ok=True)
        with pytest.raises(kind) as caught:
            upcycle(readers, wanted, folder)
        assert not list(folder.glob("model*"))
        return str(caught.value)

    readers = tiny.sources(tmp_path, models)
    readers["code"].config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1.0}
    assert "rope_parameters is" in refusal(UpcycleError)
    readers = tiny.sources(tmp_path, models)
    del readers["code"].specs["model.norm.weight"]
    assert "lacks model.norm.weight" in refusal(UpcycleError)
    readers["seed"].config["model_type"] = "gpt2"
    assert "'gpt2'" in refusal(FamilyError)
    readers["seed"].config |= {"model_type": "cohere", "hidden_act": "tanh"}
    assert "hidden_act is 'tanh'; only 'silu' or" in refusal(FamilyError)
    (tmp_path / "code" / "tokenizer.json").write_text("{}")
    readers = tiny.sources(tmp_path, models)
    assert "tokenizer.json differs" in refusal(UpcycleError)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    models = {"seed": tiny.dense("cohere", 0), "code": tiny.dense("cohere", 1)}
    with torch.no_grad():
        models["code"].model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    (tmp_path / "out").mkdir()
    with pytest.raises(UpcycleError, match=r"layers\.1\.mlp\.up_proj\.weight of 'code'"):
        upcycle(tiny.sources(tmp_path, models), settings("bam", "kv_experts"), tmp_path / "out")
