"""The fields of a request that change how its tokens are chosen, and the log-probabilities of a prompt."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bam_ray.serving import DecodeEngine, Scheduler, create_app

PROMPT = "the cat sat on the mat"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
both = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


@pytest.fixture
def client(engine: DecodeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(Scheduler(engine), "tiny")) as client:
        yield client


def complete(client: TestClient, path: str = COMPLETIONS, **fields: Any) -> Any:
    """Return the response to a request with fixed defaults."""
    content: dict[str, Any] = {"prompt": PROMPT}
    if path == CHAT:
        content = {"messages": [{"role": "user", "content": PROMPT}]}
    defaults = {"model": "tiny", "max_tokens": 6, "temperature": 0.0}
    response = client.post(path, json={**defaults, **content, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def texts(response: Any) -> list[str]:
    """Return the text of each choice, in the order of their indices."""
    choices = response["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]


def tokens_of(response: Any) -> list[str]:
    tokens: list[str] = response["choices"][0]["logprobs"]["tokens"]
    return tokens


@both
def test_logit_bias_forces_and_forbids_tokens(
    client: TestClient, tokenizer: PreTrainedTokenizerFast, path: str
) -> None:
    token = tokenizer.convert_tokens_to_ids("c")
    assert texts(complete(client, path, logit_bias={str(token): 100})) == ["cccccc"]
    usual = complete(client, logprobs=0)
    first = tokens_of(usual)[0]
    (unwanted,) = tokenizer(first).input_ids
    assert tokens_of(complete(client, logprobs=0, logit_bias={str(unwanted): -100}))[0] != first


@both
def test_choices_equal_single_requests(client: TestClient, path: str) -> None:
    greedy = complete(client, path)
    assert texts(complete(client, path, n=3)) == texts(greedy) * 3
    sampled = complete(client, path, n=3, temperature=1.0, seed=5)
    assert texts(sampled)[0] == texts(complete(client, path, temperature=1.0, seed=5))[0]
    assert len(set(texts(sampled))) > 1
    assert sampled["usage"]["prompt_tokens"] == greedy["usage"]["prompt_tokens"]
    assert sampled["usage"]["completion_tokens"] == 18


def test_choices_of_several_prompts_are_in_order(client: TestClient) -> None:
    prompts = ["the", "naive"]
    alone = [texts(complete(client, prompt=prompt))[0] for prompt in prompts]
    assert texts(complete(client, prompt=prompts, n=2)) == [alone[0]] * 2 + [alone[1]] * 2


def test_penalties_and_filters_reach_the_sampler(client: TestClient) -> None:
    bias = {"70": 1.0}  # the model repeats this token unless it is penalized
    repeated = texts(complete(client, max_tokens=20, logit_bias=bias))[0]
    changed = [
        texts(complete(client, max_tokens=20, logit_bias=bias, **{name: value}))[0]
        for name, value in (("frequency_penalty", 2), ("presence_penalty", 2), ("repetition_penalty", 50))
    ]
    assert all(text != repeated for text in changed)
    hot = {"temperature": 2.0, "seed": 1, "max_tokens": 20}
    greedy = texts(complete(client, max_tokens=20))
    assert texts(complete(client, **hot)) != greedy
    assert texts(complete(client, **hot, top_k=1)) == greedy
    assert texts(complete(client, **hot, min_p=1.0)) == greedy


def test_end_tokens_may_be_added_delayed_and_ignored(client: TestClient, tokenizer: PreTrainedTokenizerFast) -> None:
    token, end = tokenizer.convert_tokens_to_ids("c"), tokenizer.eos_token_id
    stopped = complete(client, logit_bias={str(token): 100}, stop_token_ids=[token])
    assert (texts(stopped), stopped["choices"][0]["finish_reason"]) == ([""], "stop")
    delayed = complete(client, logit_bias={str(token): 100}, stop_token_ids=[token], min_tokens=3)
    assert delayed["usage"]["completion_tokens"] == 4
    ended = complete(client, logit_bias={str(end): 100})
    assert ended["choices"][0]["finish_reason"] == "stop"
    ignored = complete(client, logit_bias={str(end): 100}, ignore_eos=True)
    assert (ignored["choices"][0]["finish_reason"], ignored["usage"]["completion_tokens"]) == ("length", 6)


@pytest.mark.parametrize("given", ["text", "tokens"])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_returns_the_log_probabilities_of_the_prompt(
    client: TestClient,
    models_by_family: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    given: str,
    max_tokens: int,
) -> None:
    ids = tokenizer(PROMPT).input_ids
    prompt = PROMPT if given == "text" else ids
    response = complete(client, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=2)
    with torch.no_grad():
        expected = models_by_family["cohere"](torch.tensor([ids])).logits[0].float().log_softmax(-1)
    (choice,) = response["choices"]
    found = choice["logprobs"]
    assert choice["text"].startswith(PROMPT)
    assert len(found["tokens"]) == len(ids) + max_tokens
    assert "".join(found["tokens"]) == choice["text"]
    assert found["text_offset"][: len(ids)] == [len("".join(found["tokens"][:i])) for i in range(len(ids))]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for place, token in enumerate(ids[1:]):
        assert found["token_logprobs"][place + 1] == pytest.approx(float(expected[place, token]), abs=1e-4)
        best = max(found["top_logprobs"][place + 1].values())
        assert best == pytest.approx(float(expected[place].max()), abs=1e-4)
    assert response["usage"]["completion_tokens"] == max_tokens


def test_echo_without_log_probabilities_and_in_streams(client: TestClient) -> None:
    plain = texts(complete(client))[0]
    assert texts(complete(client, echo=True)) == [PROMPT + plain]
    assert texts(complete(client, echo=True, n=2, prompt=["the", "a"], max_tokens=0)) == ["the", "the", "a", "a"]
    one = complete(client, prompt=[70], echo=True, max_tokens=0, logprobs=0)["choices"][0]["logprobs"]
    assert one["token_logprobs"] == [None]
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "echo": True, "logprobs": 0}
    with client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == PROMPT + plain
    assert chunks[0]["text"].startswith(PROMPT)
    whole = complete(client, echo=True, logprobs=0)["choices"][0]["logprobs"]
    offsets = [offset for chunk in chunks if chunk["logprobs"] for offset in chunk["logprobs"]["text_offset"]]
    assert offsets == whole["text_offset"]
