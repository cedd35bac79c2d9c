"""The shipped recipes of papers have the numbers that the papers give."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from bam_ray.data import Corpus
from bam_ray.families import family_of
from bam_ray.model import BamConfig
from bam_ray.pipeline.graph import task_graph
from bam_ray.settings import PRESETS, Recipe, load_recipe
from bam_ray.stages.dense import scratch_config
from bam_ray.training.schedule import learning_rate
from tests.support.command_line import bam

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PAPER, LLAMA_MOE = RECIPES / "paper-590m.yaml", RECIPES / "llama-moe-7b.yaml"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(PAPER)


def millions(model: PreTrainedModel) -> float:
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1)


def test_models_have_the_sizes_of_the_paper(recipe: Recipe, tmp_path: Path) -> None:
    """The sizes are in Table 9, in millions of parameters."""
    assert recipe.seed.scratch is not None
    facts = {"sequence_length": 2048, "vocab_size": recipe.data.tokenizer.vocab_size, "end_of_text_id": 0}
    facts |= {"dtype": "<u4", "domains": {}, "attend_across_documents": True}
    (tmp_path / "corpus.json").write_text(json.dumps(facts))
    seed = scratch_config(recipe.seed.scratch, Corpus(tmp_path))
    dense = family_of(seed.to_dict(), "the seed").convert_config(seed.to_dict())
    found = {}
    with torch.device("meta"):
        found["seed"] = millions(AutoModelForCausalLM.from_config(seed))
        for name, mixture in recipe.upcycle.mixtures.items():
            experts = {"num_experts": mixture.num_experts or 4, "num_experts_per_tok": mixture.num_experts_per_tok}
            config = BamConfig(**{**dense, **experts, "attention_experts": mixture.attention})
            found[name] = millions(AutoModelForCausalLM.from_config(config))
    assert found.pop("btx-6") == pytest.approx(776.0, rel=0.001)  # the baseline of equal total size
    assert found == {"seed": 587.2, "bam": 776.0, "bam-kv-shared": 738.3, "btx": 700.5}


def test_training_settings_are_those_of_the_paper(recipe: Recipe) -> None:
    assert recipe.seed.training is not None
    tokens = (recipe.seed.training.tokens, recipe.branch.training.tokens)
    assert tokens == (400_000_000_000, 100_000_000_000)
    assert recipe.branch.training.peak_lr == recipe.seed.training.peak_lr / 2
    assert recipe.branch.general_fraction == 0.1
    assert recipe.mix.blend == dict.fromkeys(["general", "code", "law", "math"], 0.25)
    mix = recipe.mix.training
    assert (mix.weight_decay, mix.final_lr_fraction) == (0.1, 0.1)
    rates = [learning_rate(mix, step) for step in range(1001)]
    assert max(rates) == rates[999] == 1e-4 > rates[998]
    assert not recipe.upcycle.mixtures["bam"].norm_topk_prob


def test_identities_depend_on_settings_only(recipe: Recipe) -> None:
    plain = yaml.safe_load(PAPER.read_text())
    reordered = Recipe.model_validate(dict(reversed(plain.items())))
    assert [task.id for task in task_graph(reordered)] == [task.id for task in task_graph(recipe)]
    changed = load_recipe(PAPER, ["mix.train=routers_and_shared", "metrics.routing.every=1"])
    differ = {
        task.full_name for task, other in zip(task_graph(recipe), task_graph(changed), strict=True) if task != other
    }
    assert differ == {f"mixtures/{name}" for name in recipe.upcycle.mixtures} | {"reports/report"}


def test_the_plan_of_the_paper_recipe_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Recipe
) -> None:
    assert bam(monkeypatch, "plan", str(PAPER)) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*recipe.branch.domains, *recipe.upcycle.mixtures))


def test_blend_presets_of_llama_moe_set_mix_settings() -> None:
    recipes = {name: load_recipe(LLAMA_MOE, [f"mix.blend={name}"]).mix for name in PRESETS}
    static, dynamic = recipes["static_sheared"], recipes["dynamic_llama"]
    assert load_recipe(LLAMA_MOE).mix == static
    assert round(static.training.steps * static.training.warmup_fraction) == 100
    assert static.blend is not None and sum(static.blend.values()) == pytest.approx(1.0)
    assert dynamic.blend == recipes["static_llama"].blend and dynamic.blend["common-crawl"] == 0.67
    assert recipes["dynamic_uniform"].blend is None
    follows = {name: mix.dynamic_blend and mix.dynamic_blend.every for name, mix in recipes.items()}
    assert follows == {"static_llama": None, "static_sheared": None, "dynamic_llama": 170, "dynamic_uniform": 170}
    sooner = load_recipe(LLAMA_MOE, ["mix.blend=dynamic_llama", "mix.dynamic_blend={every: 10}"]).mix
    assert sooner.dynamic_blend is not None and sooner.dynamic_blend.every == 10


def test_a_preset_has_the_identity_of_its_settings() -> None:
    named = load_recipe(LLAMA_MOE)
    plain = yaml.safe_load(LLAMA_MOE.read_text())
    plain["mix"]["blend"] = named.mix.blend
    assert [task.id for task in task_graph(Recipe.model_validate(plain))] == [task.id for task in task_graph(named)]
