"""Embedding experts, routers that read the prefix, and the prior: against a naive reference, and with every cache."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.prefix_bam import SMOOTHING, Documents
from tests.support import tiny

ALL: dict[str, Any] = {"embeddings": "experts", "router_input": "prefix", "router_prior": "bigram"}
SETTINGS: dict[str, dict[str, Any]] = {
    "embeddings": {"embeddings": "experts"},
    "prefix": {"router_input": "prefix"},
    "prior": {"router_prior": "bigram"},
    "all": ALL,
    "untied": {**ALL, "tie_word_embeddings": False},
    "btx": {**ALL, "attention_experts": "averaged", "parallel_block": False},
    "forgetting": {**ALL, "router_forgetting": 0.8},
}


def build(changes: dict[str, Any], seed: int = 0) -> BamForCausalLM:
    """Return a random mixture whose counts are random too, with few buckets so that pairs share some."""
    torch.manual_seed(seed)
    settings = {**tiny.SIZES, "num_experts_per_tok": 2, "router_prior_buckets": 1000, "eos_token_id": None, **changes}
    model = BamForCausalLM(BamConfig(**settings)).eval()
    tiny.with_random_counts(model)
    return model


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_chunks_and_steps_give_the_logits_of_one_pass(name: str) -> None:
    model = build(SETTINGS[name])
    ids = tiny.tokens(2, 12)
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    parts = [model(part, cache=cache, use_cache=True).logits for part in ids.split([5, 1, 4, 1, 1], dim=1)]
    close(torch.cat(parts, dim=1), whole)
    close(model(ids, logits_to_keep=1).logits, whole[:, -1:])


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_padding_and_packing_change_nothing(name: str) -> None:
    model = build(SETTINGS[name])
    first, second = tiny.tokens(2, 9)
    alone = [model(ids[None]).logits[0] for ids in (first, second[:6])]
    packed = torch.cat((first, second[:6]))[None]
    positions = torch.cat((torch.arange(9), torch.arange(6)))[None]
    close(model(packed, position_ids=positions, use_cache=False).logits[0], torch.cat(alone))
    batch = torch.stack((first, F.pad(second[:6], (3, 0))))
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    generated_positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    for position_ids in (None, generated_positions):
        padded = model(batch, attention_mask=mask, position_ids=position_ids).logits
        close(padded[0], alone[0])
        close(padded[1, 3:], alone[1])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generation_equals_one_pass_over_its_output(name: str, cache: str) -> None:
    model = build(SETTINGS[name])
    short, long = tiny.tokens(2, 9)
    batch = torch.stack((long, F.pad(short[:6], (3, 0))))
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    out = model.generate(
        batch, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, cache_implementation=cache
    )
    for row, start in ((0, 0), (1, 3)):
        ids = out[row, start:][None]
        assert torch.equal(model(ids).logits[0, -6:-1].argmax(-1), ids[0, -5:])


@pytest.mark.parametrize("name", ["prefix", "prior", "all"])
@torch.no_grad()
def test_beam_search_moves_the_state_with_the_beams(name: str) -> None:
    model = build(SETTINGS[name])
    ids = tiny.tokens(2, 6)
    searched = {
        use_cache: model.generate(
            ids, num_beams=3, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=use_cache,
            return_dict_in_generate=True, output_scores=True,
        )
        for use_cache in (True, False)
    }  # fmt: skip
    assert torch.equal(searched[True].sequences, searched[False].sequences)
    close(searched[True].sequences_scores, searched[False].sequences_scores)


@torch.no_grad()
def test_chunked_prefill_of_generate_is_supported() -> None:
    model = build(ALL)
    ids = tiny.tokens(1, 11)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    chunked = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, prefill_chunk_size=4)
    assert torch.equal(plain, chunked)


@torch.no_grad()
def test_an_assistant_cannot_take_back_tokens() -> None:
    model = build(ALL)
    with pytest.raises(ValueError, match="cropped"):
        model.generate(
            torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4]]), max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3
        )


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
@torch.no_grad()
def test_the_prior_equals_its_formula(forgetting: float) -> None:
    model = build({"router_prior": "bigram", "router_forgetting": forgetting})
    prior = model.model.prior
    assert prior is not None
    tokens, pairs = prior.experts.tokens.tolist(), prior.experts.pairs.tolist()
    experts, vocabulary = len(tokens), len(tokens[0])
    document = [5, 17, 5, 90, 17]
    ids = torch.tensor([[*document, *document[:3]]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    routing = model.model.routing_context(ids, ids, positions, None, None)
    assert routing is not None and routing.prior is not None
    evidence = [0.0] * experts
    expected = []
    for place, token in enumerate(document):
        for i in range(experts):
            evidence[i] *= forgetting
            if place:
                before = document[place - 1]
                bucket = (((before * 1_000_003 + token) & 0x7FFFFFFF) * 0x9E3779B1 >> 11) % 1000
                share = (tokens[i][token] + 0.5) / (sum(tokens[i]) + 0.5 * vocabulary)
                count = min(pairs[i][bucket], tokens[i][before])
                evidence[i] += math.log((count + SMOOTHING * share) / (tokens[i][before] + SMOOTHING))
        expected.append(torch.tensor([0.25 * each for each in evidence]).log_softmax(-1))
    close(routing.prior[0], torch.stack([*expected, *expected[:3]]))


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
@torch.no_grad()
def test_embedding_experts_equal_a_loop_over_tables(forgetting: float) -> None:
    model = build({**ALL, "tie_word_embeddings": False, "router_forgetting": forgetting})
    ids = tiny.tokens(1, 70)  # more than FEW_TOKENS
    routing = model.model.routing_context(ids, ids, torch.arange(70)[None], None, None)
    assert routing is not None and routing.prior is not None
    tables = model.model.embed_tokens.experts.weight
    x = model.model.embed_tokens(ids, routing)
    for place in (0, 1, 69):
        rows = tables[:, ids[0, : place + 1]]  # [N, tokens, d]
        weights = forgetting ** torch.arange(place, -1.0, -1.0)
        weights = (weights / weights.sum()).unsqueeze(1)  # [tokens, 1]
        mean = (weights * F.layer_norm(rows.mean(0), (32,))).sum(0)
        gates = (model.model.embed_tokens.gate.weight @ mean + routing.prior[0, place]).softmax(-1)
        close(x[0, place], (gates[:, None] * rows[:, -1]).sum(0))
    out = model(ids, output_hidden_states=True)
    hidden, few = out.hidden_states[-1], model(ids, logits_to_keep=3).logits
    for place in (0, 69):
        head = model.model.head
        assert head is not None
        weights = forgetting ** torch.arange(place, -1.0, -1.0)
        mean = weights @ hidden[0, : place + 1] / weights.sum()
        gates = (head.gate.weight @ mean + routing.prior[0, place]).softmax(-1)
        expected = sum(gates[i] * table @ hidden[0, place] for i, table in enumerate(model.lm_head.experts.weight))
        close(out.logits[0, place], expected * model.config.logit_scale)
    close(few, out.logits[:, -3:])


def test_documents_begin_where_positions_restart() -> None:
    ones = torch.ones(1, 7, 1)
    packed = torch.tensor([[0, 1, 2, 0, 1, 5, 6]])
    sums = Documents(packed, None, continues=False).running_sum(ones, None)
    assert sums.flatten().tolist() == [1, 2, 3, 1, 2, 1, 2]
    continued = torch.tensor([[4, 5, 0, 1, 2, 3, 4]])
    sums = Documents(continued, None, continues=True).running_sum(ones, torch.tensor([[4.0]]))
    assert sums.flatten().tolist() == [5, 6, 1, 2, 3, 4, 5]


def test_the_prior_needs_token_ids() -> None:
    model = build({"router_prior": "bigram"})
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize("name", ["all", "untied"])
def test_every_parameter_has_a_gradient(name: str) -> None:
    tiny.assert_recomputation_keeps_gradients(build(SETTINGS[name]).train(), tiny.tokens())
