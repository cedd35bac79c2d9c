"""Requests that name their domain, in place of the router prior."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bam_ray.model.one_expert import EXCLUDED
from bam_ray.serving import DecodeEngine, SamplingParams, Scheduler, create_app
from tests.support.decoding import prompts_of, run

PROMPT = "the cat sat"


@pytest.fixture
def client(models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Iterator[TestClient]:
    engine = DecodeEngine(models_by_family["bam-prefix"], tokenizer, slots=3, max_length=64, tokens_per_step=5)
    with TestClient(create_app(Scheduler(engine), "tiny")) as client:
        yield client


def complete(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 0}
    return client.post("/v1/completions", json={**body, **fields})


@pytest.mark.parametrize("weights", [{"1": 1.0}, {"0": 1.0, "2": 3.0}, {"0": 1, "1": 1, "2": 1}])
def test_weights_replace_the_prior_of_the_whole_model(
    client: TestClient, models_by_family: dict[str, Any], tokenizer: PreTrainedTokenizerFast, weights: dict[str, float]
) -> None:
    model, total = models_by_family["bam-prefix"], sum(weights.values())
    shares = [weights.get(str(expert), 0.0) / total for expert in range(3)]
    prior = torch.tensor([[math.log(share) if share else EXCLUDED for share in shares]])
    response = complete(client, domain=weights).json()["choices"][0]
    ids = tokenizer(PROMPT).input_ids
    with torch.no_grad():
        log_p = model(torch.tensor([ids]), router_prior=prior).logits[0].float().log_softmax(-1)
        without = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    expected = [float(log_p[place, token]) for place, token in enumerate(ids[1:])]
    assert response["logprobs"]["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    assert not torch.allclose(log_p, without, atol=1e-3)


def test_a_name_means_all_weight_on_it(client: TestClient) -> None:
    assert complete(client, domain="1").json()["choices"] == complete(client, domain={"1": 2.0}).json()["choices"]
    named = complete(client, domain="2", routing=True).json()["choices"][0]
    assert all(layer == [0.0, 0.0, 1.0] for token in named["routing"] for layer in token["attention"])


def test_other_requests_keep_the_computed_prior(
    models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = DecodeEngine(models_by_family["bam-prefix"], tokenizer, slots=3, max_length=64)
    prompts = prompts_of(3, engine.vocab_size)
    plain = SamplingParams(max_tokens=6, temperature=0, logprobs=0)
    named = SamplingParams(max_tokens=6, temperature=0, logprobs=0, expert_weights=(0.0, 1.0, 0.0))
    kinds = [plain, named, plain]
    together = run(engine, prompts, lambda index: kinds[index])
    for prompt, params, found in zip(prompts, kinds, together, strict=True):
        (alone,) = run(engine, [prompt], lambda _, params=params: params)
        assert alone.tokens == found.tokens
        expected = [each.logprob for each in alone.logprobs]
        assert [each.logprob for each in found.logprobs] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ("law", "domain 'law' is no expert of this model: use 0, 1, 2"),
        ({"0": 1.0, "law": 1.0}, "'law' is no expert"),
        ({"0": 0.0}, "sum above 0"),
        ({}, "sum above 0"),
        ({"0": -1.0}, "domain"),
        (5, "domain"),
    ],
)
def test_wrong_domains_are_refused(client: TestClient, domain: Any, message: str) -> None:
    response = complete(client, domain=domain)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_models_without_a_prior_refuse_a_domain(engine: DecodeEngine) -> None:
    with TestClient(create_app(Scheduler(engine), "tiny")) as client:
        assert "whose routers have a prior" in complete(client, domain="0").json()["error"]["message"]
