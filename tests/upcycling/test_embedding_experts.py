"""Embedding experts, routers that read the prefix and the prior, from dense models to mixtures, in every family."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bam_ray.errors import SettingsError, UpcycleError
from bam_ray.families import EMBEDDING_ROUTERS, FAMILIES, PRIOR_PAIRS, PRIOR_TOKENS, Role
from bam_ray.model import BamForCausalLM
from bam_ray.model.bigrams_bam import pair_bucket
from bam_ray.model.embeddings_bam import BamInputEmbeddings
from bam_ray.model.routing_bam import BamRouter
from bam_ray.settings import mixture_settings
from bam_ray.upcycling import load_model
from tests.support import tiny
from tests.support.mixture_folders import (
    BUCKETS,
    NAMES,
    branches,
    domain_counts,
    domain_rows,
    load,
    mixture,
    reader,
    settings,
    upcycle_into,
)

VOCAB = tiny.SIZES["vocab_size"]
MODELS = NAMES[:3]
TIED = {family for family, config in tiny.CONFIGS.items() if config.tie_word_embeddings}
INPUT, OUTPUT = "model.embed_tokens.experts.weight", "lm_head.experts.weight"
TABLES = {"embeddings": "experts"}
ROUTERS: dict[str, dict[str, Any]] = {
    "token": {"init": "random"},
    "prefix": {"init": "random", "input": "prefix"},
    "prior": {"init": "zero", "prior": "bigram"},
    "both": {"init": "random", "input": "prefix", "prior": "bigram"},
}


def build(
    folder: Path, models: dict[str, PreTrainedModel], case: str = "bam kv_experts", router: str = "both", **more: Any
) -> BamForCausalLM:
    chosen = settings(case, **{**TABLES, "router": ROUTERS[router], **more})
    return mixture(folder, models, chosen, counts=domain_counts(*MODELS) if "prior" in ROUTERS[router] else None)


def test_tied_and_untied_families_are_tested() -> None:
    assert TIED and set(tiny.CONFIGS) - TIED


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@torch.no_grad()
def test_tables_are_the_embeddings_of_the_models(tmp_path: Path, family: str) -> None:
    build(tmp_path, branches(family))
    made = reader(tmp_path / "mixture")
    roles = {INPUT: Role.EMBEDDING} if family in TIED else {INPUT: Role.EMBEDDING, OUTPUT: Role.HEAD}
    assert {name for name in made.specs if name.endswith("experts.weight")} == roles.keys()
    for name, role in roles.items():
        models = [reader(tmp_path / each).read(FAMILIES[family].name_of(role)) for each in MODELS]
        assert torch.equal(made.read(name), torch.stack(models))
    for name in EMBEDDING_ROUTERS:
        assert made.specs[name].shape == (3, 32)


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_identical_branches_reproduce_the_seed(tmp_path: Path, family: str, router: str) -> None:
    seed = tiny.dense(family, 0)
    ids = tiny.tokens(2, 40)
    for case in ("bam kv_experts", "btx"):
        model = build(tmp_path / case, dict.fromkeys(MODELS, seed), case, router)
        torch.testing.assert_close(model(ids).logits, seed(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("router", ["token", "both"])
@torch.no_grad()
def test_one_expert_alone_is_its_branch(tmp_path: Path, family: str, router: str) -> None:
    """Embeddings and head are experts too, so only the norms between the layers must be the same in all models."""
    models = branches(family)
    for name, value in models["seed"].named_parameters():
        if "norm" in name and "self_attn" not in name:
            for model in models.values():
                model.get_parameter(name).copy_(value)
    mixed = build(tmp_path, models, router=router, num_experts_per_tok=1)
    ids = tiny.tokens()
    routers = [module for module in mixed.modules() if isinstance(module, BamRouter)]
    assert len(routers) == 2 * mixed.config.num_hidden_layers + 2
    for expert, name in enumerate(MODELS):
        hooks = [each.register_forward_hook(lambda _, __, out, i=expert: one_hot(out, i)) for each in routers]
        torch.testing.assert_close(mixed(ids).logits, models[name](ids).logits, atol=1e-5, rtol=1e-5)
        for hook in hooks:
            hook.remove()


def one_hot(logits: Tensor, expert: int) -> Tensor:
    result = torch.full_like(logits, -1e4)
    result[..., expert] = 0.0
    return result


@torch.no_grad()
def test_the_order_of_branches_has_no_effect(tmp_path: Path) -> None:
    models, order = branches("qwen3"), [0, 2, 1]
    one = build(tmp_path / "a", models)
    other = build(tmp_path / "b", {MODELS[i]: models[MODELS[i]] for i in order})
    for name, parameter in other.named_parameters():
        if ".gate." in name:
            parameter.copy_(one.get_parameter(name)[order])
    ids = tiny.tokens()
    torch.testing.assert_close(one(ids).logits, other(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bf16_sources_keep_their_bits(tmp_path: Path) -> None:
    build(tmp_path, {name: model.bfloat16() for name, model in branches().items()})
    made = reader(tmp_path / "mixture")
    models = [reader(tmp_path / name).read("lm_head.weight") for name in MODELS]
    assert torch.equal(made.read(OUTPUT), torch.stack(models))
    assert made.read(PRIOR_TOKENS).dtype == torch.int64 and made.read(PRIOR_PAIRS).dtype == torch.int32
    model = load(tmp_path / "mixture")
    assert model.dtype == torch.bfloat16 and model.model.prior is not None
    assert torch.equal(model.model.prior.experts.tokens, made.read(PRIOR_TOKENS))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_prior_has_the_counts_of_the_text(tmp_path: Path, family: str) -> None:
    build(tmp_path, branches(family), "btx", "prior", embeddings="averaged")
    made = reader(tmp_path / "mixture")
    for number, model in enumerate(MODELS):
        stream = domain_rows(model).flatten().tolist()
        tokens, pairs = [0] * VOCAB, [0] * BUCKETS
        for token in stream:
            tokens[token] += 1
        for before, token in itertools.pairwise(stream):
            if before != 1:  # the end of a document
                pairs[pair_bucket(torch.tensor(before), torch.tensor(token), VOCAB, BUCKETS)] += 1
        assert made.read(PRIOR_TOKENS)[number].tolist() == tokens
        assert made.read(PRIOR_PAIRS)[number].tolist() == pairs


def test_copies_of_the_seed_have_its_counts_and_its_table(tmp_path: Path) -> None:
    model = build(tmp_path, branches(), num_experts=5)
    assert model.config.expert_names == ["seed", "code", "law", "seed-2", "seed-3"]
    made = reader(tmp_path / "mixture")
    for name in (PRIOR_TOKENS, PRIOR_PAIRS, INPUT, OUTPUT):
        tensor = made.read(name)
        assert len(tensor) == 5
        assert torch.equal(tensor[3], tensor[0]) and torch.equal(tensor[4], tensor[0])
        assert not torch.equal(tensor[1], tensor[0])
    lineage = json.loads((tmp_path / "mixture" / "lineage.json").read_text())["tensors"]
    assert lineage[PRIOR_TOKENS]["text_of"] == ["seed", "code", "law", "seed", "seed"]


def test_branches_alone_need_no_text_of_the_seed(tmp_path: Path) -> None:
    chosen = settings(**TABLES, router=ROUTERS["both"], seed_expert=False)
    model = mixture(tmp_path, branches(), chosen, counts=domain_counts(*MODELS[1:]))
    assert model.config.expert_names == ["code", "law"]
    made = reader(tmp_path / "mixture")
    assert torch.equal(
        made.read(PRIOR_TOKENS), torch.stack([each.tokens for each in domain_counts(*MODELS[1:]).values()])
    )
    assert torch.equal(made.read(OUTPUT)[0], reader(tmp_path / "code").read("lm_head.weight"))


@torch.no_grad()
def test_a_model_may_have_more_rows_than_tokens(tmp_path: Path) -> None:
    chosen = settings(**TABLES, router=ROUTERS["both"])
    model = mixture(tmp_path, branches(), chosen, counts=domain_counts(*MODELS, vocab_size=VOCAB - 5))
    assert model.config.router_prior_vocab_size == VOCAB - 5
    assert reader(tmp_path / "mixture").specs[PRIOR_TOKENS].shape == (3, VOCAB - 5)
    assert model(torch.tensor([[2, VOCAB - 1, VOCAB - 3, 7]])).logits.isfinite().all()
    with pytest.raises(UpcycleError, match="a vocabulary of 97 tokens, but the embedding has only 96 rows"):
        upcycle_into(
            tmp_path / "x",
            tiny.sources(tmp_path, branches()),
            chosen,
            counts=domain_counts(*MODELS, vocab_size=VOCAB + 1),
        )


def test_a_prior_needs_text_of_every_model(tmp_path: Path) -> None:
    chosen = settings("btx", router=ROUTERS["prior"])
    with pytest.raises(UpcycleError, match=r"router\.prior: bigram needs text of every model, .* none of \['law'\]"):
        upcycle_into(tmp_path / "x", tiny.sources(tmp_path, branches()), chosen, counts=domain_counts("seed", "code"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_lineage_has_an_origin_for_every_tensor(tmp_path: Path, family: str) -> None:
    build(tmp_path, branches(family))
    lineage = json.loads((tmp_path / "mixture" / "lineage.json").read_text())
    origins = lineage["tensors"]
    assert origins.keys() == reader(tmp_path / "mixture").specs.keys()
    name = FAMILIES[family].name_of(Role.EMBEDDING)
    assert origins[INPUT] == {"stack": [{"take": f"{model}:{name}"} for model in MODELS]}
    assert origins[PRIOR_PAIRS] == {"new": "counted", "text_of": MODELS}
    for router in EMBEDDING_ROUTERS:
        assert origins[router]["new"] == "normal" and origins[router]["label"] == router
    assert lineage["history"][0]["upcycle"]["embeddings"] == "experts"
    assert lineage["history"][0]["upcycle"]["router"] == {"input": "prefix", "prior": "bigram"}


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3"])
@pytest.mark.parametrize("how", ["means", "ridge"])
@torch.no_grad()
def test_fitted_routers_separate_domains(tmp_path: Path, family: str, how: Literal["means", "ridge"]) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = {
        name: torch.randint(2 + 4 * number, 8 + 4 * number, (8, 16), generator=generator)  # neighbors share tokens
        for number, name in enumerate(MODELS)
    }
    chosen = settings(embeddings="experts", router={"init": how, "input": "prefix"})
    upcycled = upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, branches(family)), chosen, texts)
    assert upcycled.separation is not None
    routers = upcycled.separation.routers
    assert [(each.layer, each.kind) for each in routers][0::5] == [(None, "embedding"), (None, "head")]
    for router in routers:
        score, random = router.scores[how], router.scores["random"]
        assert score.accuracy > 0.6 and score.accuracy > random.accuracy
        assert score.cross_entropy < min(random.cross_entropy, upcycled.separation.chance.cross_entropy) - 0.2
    model = load(tmp_path / "mixture")
    found: list[Tensor] = []
    assert isinstance(model.model.embed_tokens, BamInputEmbeddings) and model.model.head is not None
    for router in (model.model.embed_tokens.gate, model.model.head.gate):
        router.register_forward_hook(lambda _, __, logits: found.append(logits))
    model(torch.cat(list(texts.values())))
    expected = torch.arange(3).repeat_interleave(8)
    for logits in found:
        assert (logits[:, -1].argmax(-1) == expected).float().mean() > 0.9  # after 16 tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "soup", "embeddings": "experts"}, "embeddings: experts needs experts, which a soup does not have"),
        ({"method": "sparse", "num_experts": 2, "embeddings": "experts"}, "embeddings: unknown key"),
        ({"method": "btx", "router": {"init": "ridge", "prior": "bigram"}}, "use init: zero"),
        ({"method": "btx", "router": {"forgetting": 0.9}}, "set input: prefix or a prior"),
        ({"method": "btx", "router": {"forgetting": 0.0, "input": "prefix"}}, "router.forgetting"),
        ({"method": "split", "num_experts": 2, "router": {"prior": "bigram"}}, "which method split does not have"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        mixture_settings(given)


@torch.no_grad()
def test_a_loaded_model_has_the_exact_counts(tmp_path: Path) -> None:
    texts = domain_counts(*MODELS)
    large = (1 << 40) + 1  # not a value of fp32
    texts["law"].tokens[7] = large
    chosen = settings("btx", router=ROUTERS["prior"])
    upcycle_into(tmp_path / "mixture", tiny.sources(tmp_path, branches()), chosen, counts=texts)
    for model in (load(tmp_path / "mixture"), load_model(reader(tmp_path / "mixture"))):
        state = model.state_dict()
        assert state[PRIOR_TOKENS][2, 7] == large and state[PRIOR_PAIRS].dtype == torch.int32


@pytest.mark.slow
@torch.no_grad()
def test_a_mixture_loads_without_this_package(tmp_path: Path) -> None:
    model = build(tmp_path, branches("qwen3"))
    ids = tiny.tokens()
    torch.save((ids, model(ids).logits), tmp_path / "mixture" / "want.pt")
    script = """
import sys
sys.modules["bam_ray"] = None
import torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
ids, logits = torch.load(folder + "/want.pt")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
torch.testing.assert_close(model(ids).logits, logits)
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    command = [sys.executable, "-c", script, str(tmp_path / "mixture")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
