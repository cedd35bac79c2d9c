"""Each field and behavior of OpenAI's API, and of vLLM's extensions of it, called with the `openai` client.

A row of a table has the fields of a request, and a check of the response or the error that is expected.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bam_ray.serving import DecodeEngine, Scheduler, create_app
from tests.support.http_server import running_server

MODEL = "tiny"
C, E2 = 67, 159  # the tokens "c" and the byte 0xE2
ONLY_C: dict[str, Any] = {"logit_bias": {str(C): 100}}


@dataclass(frozen=True)
class Refused:
    """An expected error."""

    param: str | None
    code: str | None = None
    status: int = 400


UNKNOWN = "unknown_parameter"
UNSUPPORTED = "unsupported_value"
Check = Callable[[Any], bool] | Refused
Table = dict[str, tuple[dict[str, Any], Check]]


def texts(response: Any) -> list[str]:
    """Return the text of each choice."""
    assert [choice.index for choice in response.choices] == list(range(len(response.choices)))
    return [choice.text if hasattr(choice, "text") else choice.message.content for choice in response.choices]


def generated(count: int) -> Check:
    return lambda response: response.usage.completion_tokens == count


def ends(reason: str, text: str) -> Check:
    return lambda response: (response.choices[0].finish_reason, texts(response)) == (reason, [text])


def prompts(count: int) -> Check:
    return lambda response: len(texts(response)) == count


def works(response: Any) -> bool:
    return bool(response.choices)


BOTH: Table = {
    "max_tokens": ({"max_tokens": 3}, generated(3)),
    "max_tokens is null": ({"max_tokens": None, "stop": "c", **ONLY_C}, ends("stop", "")),
    "max_tokens is text": ({"max_tokens": "3"}, Refused("max_tokens")),
    "max_tokens is negative": ({"max_tokens": -1}, Refused("max_tokens")),
    "max_tokens is too large": ({"max_tokens": 64}, lambda refused: refused.code == "context_length_exceeded"),
    "temperature and top_p": ({"temperature": 0.7, "top_p": 0.9, "seed": 3}, generated(4)),
    "temperature above 2": ({"temperature": 2.1}, Refused("temperature")),
    "top_p above 1": ({"top_p": 1.1}, Refused("top_p")),
    "stop ends the text": ({"stop": ["x", "c"], **ONLY_C}, ends("stop", "")),
    "seventeen stop strings": ({"stop": ["x"] * 17}, Refused("stop")),
    "n": ({"n": 3}, prompts(3)),
    "n is 0": ({"n": 0}, Refused("n")),
    "best_of is 1": ({"best_of": 1}, prompts(1)),
    "best_of": ({"best_of": 2}, Refused("best_of", UNSUPPORTED)),
    "penalties": ({"frequency_penalty": 1, "presence_penalty": -1}, generated(4)),
    "a penalty above 2": ({"presence_penalty": 2.1}, Refused("presence_penalty")),
    "logit_bias": (ONLY_C, ends("length", "cccc")),
    "logit_bias of an unknown token": ({"logit_bias": {"300": 1}}, Refused("logit_bias")),
    "user": ({"user": "alice", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}, works),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, Refused("stream")),
    "response_format is text": ({"response_format": {"type": "text"}}, works),
    "response_format without a schema": (
        {"response_format": {"type": "json_schema"}},
        Refused("response_format.json_schema"),
    ),
    "stop is a number": ({"stop": 5}, Refused("stop")),
    "an unknown field": ({"best_off": 1}, Refused("best_off", UNKNOWN)),
    "an unknown model": ({"model": "other"}, Refused("model", "model_not_found", 404)),
    # Fields of vLLM
    "top_k and min_p": ({"top_k": 5, "min_p": 0.1, "temperature": 1.0}, generated(4)),
    "top_k is -1": ({"top_k": -1}, generated(4)),
    "repetition_penalty": ({"repetition_penalty": 1.2}, generated(4)),
    "min_tokens": ({"min_tokens": 3, "logit_bias": {"0": 100}}, generated(4)),
    "min_tokens above max_tokens": ({"min_tokens": 5}, Refused("min_tokens")),
    "ignore_eos": ({"ignore_eos": True, "logit_bias": {"0": 100}}, generated(4)),
    "stop_token_ids": ({"stop_token_ids": [C], **ONLY_C}, ends("stop", "")),
    "guided_regex": ({"guided_regex": "a"}, Refused("guided_regex", UNKNOWN)),
    "prompt_logprobs": ({"prompt_logprobs": 1}, Refused("prompt_logprobs", UNKNOWN)),
    "skip_special_tokens is true": ({"skip_special_tokens": True}, works),
    "skip_special_tokens is false": ({"skip_special_tokens": False}, Refused("skip_special_tokens", UNSUPPORTED)),
}
COMPLETIONS: Table = {
    **BOTH,
    "16 tokens by default": ({"max_tokens": None}, generated(16)),
    "texts": ({"prompt": ["the", "a"]}, prompts(2)),
    "tokens": ({"prompt": [5, 6]}, lambda response: response.usage.prompt_tokens == 2),
    "lists of tokens": ({"prompt": [[5, 6], [7]]}, lambda response: response.usage.prompt_tokens == 3),
    "n of each prompt": ({"prompt": ["the", "a"], "n": 2}, prompts(4)),
    "no prompts": ({"prompt": []}, Refused("prompt")),
    "max_tokens is 0": ({"max_tokens": 0}, ends("length", "")),
    "max_tokens is 0 with echo": ({"max_tokens": 0, "echo": True}, ends("length", "the")),
    "echo": ({"echo": True, **ONLY_C}, ends("length", "thecccc")),
    "max_completion_tokens": ({"max_completion_tokens": 3}, Refused("max_completion_tokens", UNKNOWN)),
    "suffix": ({"suffix": "x"}, Refused("suffix", UNSUPPORTED)),
    "21 logprobs": ({"logprobs": 21}, Refused("logprobs")),
    "logprobs is 0": (
        {"logprobs": 0},
        lambda response: (
            [list(top) for top in response.choices[0].logprobs.top_logprobs]
            == [[token] for token in response.choices[0].logprobs.tokens]
        ),
    ),
}
CHAT: Table = {
    **BOTH,
    "max_completion_tokens": ({"max_completion_tokens": 3}, generated(3)),
    "max_tokens is 0": ({"max_tokens": 0}, Refused("max_tokens")),
    "top_logprobs without logprobs": ({"top_logprobs": 2}, Refused("top_logprobs")),
    "21 top_logprobs": ({"logprobs": True, "top_logprobs": 21}, Refused("top_logprobs")),
    "logprobs": (
        {"logprobs": True, "top_logprobs": 2},
        lambda response: [len(each.top_logprobs) for each in response.choices[0].logprobs.content] == [2] * 4,
    ),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, Refused("tools", UNSUPPORTED)),
    "tool_choice without tools": ({"tool_choice": "auto", "parallel_tool_calls": False}, works),
    "tool_choice": ({"tool_choice": "required"}, Refused("tool_choice", UNSUPPORTED)),
    "echo": ({"echo": True}, Refused("echo", UNKNOWN)),
    "no messages": ({"messages": []}, Refused("messages")),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        Refused("messages.0.content.0.type"),
    ),
}
CASES = [("completions", COMPLETIONS, name) for name in COMPLETIONS] + [("chat", CHAT, name) for name in CHAT]


@pytest.fixture(scope="module")
def client(models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Iterator[openai.OpenAI]:
    """Return a client of a server for requests that change nothing."""
    assert (tokenizer.decode([C]), tokenizer.convert_tokens_to_ids("â")) == ("c", E2)
    engine = DecodeEngine(models_by_family["cohere"], tokenizer, slots=4, max_length=64)
    with (
        running_server(create_app(Scheduler(engine), MODEL)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, path: str, stream: bool = False, **fields: Any) -> Any:
    """Send a request with fixed defaults."""
    body: dict[str, Any] = {"max_tokens": 4, "temperature": 0, **fields}
    if path == "completions":
        return client.completions.create(model=MODEL, prompt="the", stream=stream, extra_body=body)
    messages: Any = [{"role": "user", "content": "the"}]
    return client.chat.completions.create(model=MODEL, messages=messages, stream=stream, extra_body=body)


@pytest.mark.parametrize(("path", "table", "name"), CASES, ids=[f"{path}: {name}" for path, _, name in CASES])
def test_fields(client: openai.OpenAI, path: str, table: Table, name: str) -> None:
    fields, check = table[name]
    if not isinstance(check, Refused) and name != "max_tokens is too large":
        assert check(ask(client, path, **fields))
        return
    with pytest.raises(openai.APIStatusError) as raised:
        ask(client, path, **fields)
    error = raised.value
    assert len(error.message.splitlines()) == 1
    assert error.type == "invalid_request_error"
    if isinstance(check, Refused):
        assert (error.status_code, error.param, error.code) == (check.status, check.param, check.code)
    else:
        assert check(error)


def test_log_probabilities_of_parts_of_characters(client: openai.OpenAI) -> None:
    response = ask(client, "completions", prompt="a€b", echo=True, logprobs=1, logit_bias={str(E2): 100}, max_tokens=2)
    (choice,) = response.choices
    part = "bytes:\\xe2"
    assert choice.text == "a€b\ufffd\ufffd"
    assert choice.logprobs.tokens == ["a", part, "bytes:\\x82", "bytes:\\xac", "b", part, part]
    assert choice.logprobs.text_offset == [0, 1, 1, 1, 2, 3, 3]
    assert choice.logprobs.top_logprobs[0] is None
    for token, logprob, top in zip(
        choice.logprobs.tokens[1:], choice.logprobs.token_logprobs[1:], choice.logprobs.top_logprobs[1:], strict=True
    ):
        assert top[token] == logprob, "the token itself is always there"
        assert len(top) <= 2
    response = ask(client, "chat", logprobs=True, top_logprobs=1, logit_bias={str(E2): 100})
    token = response.choices[0].logprobs.content[0]
    assert (token.token, token.bytes) == ("\\xe2", [0xE2])


@pytest.mark.parametrize("path", ["completions", "chat"])
def test_streams_of_several_choices_equal_whole_responses(client: openai.OpenAI, path: str) -> None:
    fields: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 8}
    whole = ask(client, path, **fields)
    found, reasons = [""] * 3, {}
    for chunk in ask(client, path, stream=True, **fields):
        assert chunk.id.startswith("cmpl-" if path == "completions" else "chatcmpl-")
        for choice in chunk.choices:
            assert choice.index not in reasons, "the finish reason is last"
            found[choice.index] += choice.text if path == "completions" else choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert found == texts(whole)
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}


@pytest.mark.parametrize("path", ["completions", "chat"])
@pytest.mark.parametrize("continuous", [True, False])
def test_usage_in_streams(client: openai.OpenAI, path: str, continuous: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    *chunks, last = ask(client, path, stream=True, stream_options=options, n=2, ignore_eos=True)
    usage = ask(client, path, n=2, ignore_eos=True).usage
    assert (last.choices, last.usage) == ([], usage)
    if not continuous:
        assert all(chunk.usage is None for chunk in chunks)
        return
    for index in range(2):
        counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.choices[0].index == index]
        assert counts == sorted(counts)
        assert counts[-1] == 4
    assert all(chunk.usage.prompt_tokens == usage.prompt_tokens for chunk in chunks)
    alone = ask(client, path, stream=True, stream_options={"continuous_usage_stats": True})
    assert all(chunk.usage is None for chunk in alone), "it needs include_usage"


def test_paths(client: openai.OpenAI) -> None:
    (card,) = client.models.list()
    assert (card.id, card.object, card.owned_by) == (MODEL, "model", "bam-ray")
    assert client.models.retrieve(MODEL) == card
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="the")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=MODEL, input="the")


def test_every_response_has_a_request_id(client: openai.OpenAI) -> None:
    response = client.completions.create(model=MODEL, prompt="the", extra_headers={"x-request-id": "own"})
    assert response._request_id == "own"
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, "chat", unknown=1)
    assert str(raised.value.request_id).startswith("req_")


def test_the_tokenizer_is_described_as_in_vllm(client: openai.OpenAI) -> None:
    info = httpx.get(f"{client.base_url.join('/tokenizer_info')}").json()
    assert info == {
        "tokenizer_class": info["tokenizer_class"],
        "model_max_length": 64,
        "bos_token": None,
        "eos_token": "<|end|>",
        "unk_token": None,
        "pad_token": "<|end|>",
        "chat_template": None,
    }
    assert info["tokenizer_class"]
