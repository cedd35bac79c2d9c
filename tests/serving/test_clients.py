"""Requests of chat front ends and agents, and requests that nothing can serve: each is answered in one line."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from httpx import Response
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bam_ray.serving import DecodeEngine, SamplingParams, Scheduler, create_app
from tests.support.decoding import run

USER = {"role": "user", "content": "hi"}


@pytest.fixture
def client(engine: DecodeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(Scheduler(engine), "tiny"), raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, path: str, body: dict[str, Any]) -> Response:
    """Send JSON that also escapes half characters, which clients with another library send."""
    headers = {"Content-Type": "application/json"}
    return client.post(path, content=json.dumps({"model": "tiny", "max_tokens": 2, **body}), headers=headers)


def chat(client: TestClient, *messages: Any, **settings: Any) -> Response:
    return post(client, "/v1/chat/completions", {"messages": messages, **settings})


def complete(client: TestClient, **settings: Any) -> Response:
    return post(client, "/v1/completions", settings)


def error_of(response: Response, status: int = 400) -> str:
    """Return the message of an error, which must be one line."""
    assert response.status_code == status, response.text
    message = str(response.json()["error"]["message"])
    assert message and len(message.splitlines()) == 1
    return message


def test_settings_may_be_null(client: TestClient) -> None:
    shared = ("temperature", "top_p", "seed", "stop", "stream", "stream_options", "logprobs", "n", "user", "logit_bias")
    penalties = ("frequency_penalty", "presence_penalty")
    of_chat = ("max_completion_tokens", "top_logprobs", "tools", "tool_choice", "response_format", "modalities")
    of_completions = ("best_of", "echo", "suffix")
    response = chat(client, USER, **dict.fromkeys((*shared, *penalties, *of_chat)))
    assert response.status_code == 200, response.text
    response = complete(client, prompt="hi", **dict.fromkeys((*shared, *penalties, *of_completions)))
    assert response.status_code == 200, response.text
    streamed = complete(client, prompt="hi", stream=True, stream_options={"include_usage": None})
    assert streamed.status_code == 200
    assert "null" not in streamed.text.partition("usage")[0].partition("error")[2]
    assert chat(client, USER, max_tokens=None, max_completion_tokens=2).status_code == 200


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
        {"role": "developer", "content": "be brief", "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ],
)
def test_turns_of_agents_are_answered(client: TestClient, turn: dict[str, Any]) -> None:
    assert chat(client, USER, turn, USER).status_code == 200


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_other_turns_need_content(client: TestClient, role: str) -> None:
    assert f"the content of a message of role '{role}' is missing" in error_of(chat(client, {"role": role}))


def test_six_stop_strings_are_served(client: TestClient) -> None:
    stops = ["\nYou:", "\nUser:", "###", "<|im_end|>", "</s>", "\n\n\n"]
    assert complete(client, prompt="hi", stop=stops).status_code == 200


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 5 }}",
        "{{ messages[0].content.missing.deeper }}",
        "{{ none_there(3) }}",
        "{{ 1 // 0 }}",
        "{{ messages[99].content.x }}",
        "{% for m in messages %}{{ m.content }",
        "{{ raise_exception('no system\\nrole') }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_that_fails_is_one_error(
    client: TestClient, tokenizer: PreTrainedTokenizerFast, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    message = error_of(chat(client, USER))
    assert message.startswith("the model's chat template rejects these messages: ")
    assert "operand" not in message and "concatenate" not in message


def test_half_characters_cause_no_server_error(
    client: TestClient, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = "a\ud83d"
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}{{ messages[0].name }}")
    responses = [
        complete(client, prompt=half),
        complete(client, prompt=[half]),
        complete(client, prompt="hi", stop=half),
        complete(client, prompt="hi", suffix=half),
        complete(client, prompt="hi", user=half, model=half),
        chat(client, {**USER, "content": half}),
        chat(client, {**USER, "name": half}),
        chat(client, {**USER, half: half}, **{half: half}),
        chat(client, USER, response_format={half: half}),
    ]
    assert {response.status_code for response in responses} <= {200, 400, 404}
    assert chat(client, {**USER, "name": half}).status_code == 200


def test_the_text_of_exceptions_is_not_sent(
    client: TestClient, engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise FileNotFoundError("/srv/models/secret.safetensors")

    monkeypatch.setattr(engine, "step", fail)
    message = error_of(complete(client, prompt="hi"), 500)
    assert message == "the model failed: see the log of the server"
    streamed = complete(client, prompt="hi", stream=True)
    assert "the model failed" in streamed.text and "/srv" not in streamed.text


def test_long_values_are_not_repeated_in_errors(client: TestClient) -> None:
    assert len(error_of(complete(client, prompt="hi", n="x" * 100_000))) < 200


def test_a_special_token_as_stop_string_ends_the_text(
    models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = tokenizer("t").input_ids[0]
    added = {**tokenizer.added_tokens_decoder, turn: AddedToken("<|turn|>", special=True)}
    monkeypatch.setattr(type(tokenizer), "added_tokens_decoder", property(lambda self: added))
    model = models_by_family["llama"]
    engine = DecodeEngine(model, tokenizer, slots=2, max_length=32)
    script = iter([*tokenizer("no").input_ids, turn, *tokenizer("more").input_ids])

    def scripted(**arguments: object) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor([[next(script)]]), len(tokenizer)))

    monkeypatch.setattr(model, "forward", scripted)
    params = SamplingParams(max_tokens=9, temperature=0, stop=("<|turn|>",))
    (delta,) = run(engine, [tokenizer("hi").input_ids], lambda _: params)
    assert (delta.text, delta.finish_reason) == ("no", "stop")
