"""The experts that computed each token, as the endpoint reports them."""

import json
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bam_ray.serving import DecodeEngine, Scheduler, create_app

PROMPT = "the cat sat on the mat"
TOKENS = 5
MIXTURES = ("bam", "bam-prefix", "bam-shared")


def naive_routing(model: Any, ids: list[int]) -> dict[str, list[list[float]]]:
    """Return the shares [layers][N] at the last position of `ids`, computed from the logits of the routers."""
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_router_logits=True)
    shares: dict[str, list[list[float]]] = {"ffn": [], "attention": []}
    for logits in out.router_logits:
        weights = logits[-1].softmax(-1)
        kept = weights.topk(model.config.num_experts_per_tok).indices.tolist()
        total = sum(float(weights[expert]) for expert in kept)
        shares["ffn"].append([float(w) / total if expert in kept else 0.0 for expert, w in enumerate(weights)])
    shares["attention"] = [logits[-1].softmax(-1).tolist() for logits in out.attention_router_logits]
    return shares


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("streamed", [True, False])
def test_routing_equals_that_of_the_whole_model(
    models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, name: str, streamed: bool
) -> None:
    model = models_by_family[name]
    engine = DecodeEngine(model, tokenizer, slots=3, max_length=64, tokens_per_step=4)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "routing": True}
    with TestClient(create_app(Scheduler(engine), "tiny")) as client:
        response = client.post("/v1/completions", json={**body, "stream": streamed})
        assert response.status_code == 200, response.text
        plain = client.post("/v1/completions", json={**body, "routing": False}).json()["choices"][0]
        (card,) = client.get("/v1/models").json()["data"]
    events = response.text.removesuffix("data: [DONE]\n\n").split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event]
    found = [each for chunk in chunks for each in chunk["choices"][0]["routing"] or []]
    assert (plain["routing"], len(found)) == (None, TOKENS)
    assert "".join(each["text"] for each in found) == plain["text"]
    ids = tokenizer(PROMPT).input_ids
    for each in found:
        expected = naive_routing(model, ids)
        for part in ("ffn", "attention"):
            torch.testing.assert_close(torch.tensor(each[part]), torch.tensor(expected[part]), atol=6e-4, rtol=0)
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    assert card["routing"] == {"experts": ["0", "1", "2"], "ffn_layers": [0, 1], "attention_layers": [0, 1]}


def test_only_requests_that_want_it_have_routing(
    models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = DecodeEngine(models_by_family["bam"], tokenizer, slots=3, max_length=64)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "routing": True}
    with TestClient(create_app(Scheduler(engine), "tiny")) as client:
        choices = client.post("/v1/chat/completions", json={**body, "n": 2}).json()["choices"]
    assert [len(choice["routing"]) for choice in choices] == [3, 3]
    for choice in choices:
        assert "".join(each["text"] for each in choice["routing"]) == choice["message"]["content"]


def test_dense_models_refuse_routing(engine: DecodeEngine) -> None:
    with TestClient(create_app(Scheduler(engine), "tiny")) as client:
        response = client.post("/v1/completions", json={"model": "tiny", "prompt": "the", "routing": True})
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "this model has no experts: omit routing"
        assert client.get("/v1/models").json()["data"][0]["routing"] is None
