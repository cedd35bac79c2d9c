"""No field of a request is ignored silently, and every response can be traced and understood."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from bam_ray.errors import ServingError
from bam_ray.serving import DecodeEngine, Scheduler, create_app

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
REQUIRED: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "the"},
    CHAT: {"messages": [{"role": "user", "content": "the"}]},
}
both = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


@pytest.fixture
def client(engine: DecodeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(Scheduler(engine), "tiny"), raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, path: str, **fields: Any) -> Any:
    return client.post(path, json={"model": "tiny", "max_tokens": 2, **REQUIRED[path], **fields})


def error_of(response: Any, status: int = 400) -> Any:
    assert response.status_code == status, response.text
    return response.json()["error"]


@both
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "alice"),
        ("safety_identifier", "x"),
        ("prompt_cache_key", "x"),
        ("prompt_cache_retention", "24h"),
        ("metadata", {"a": "b"}),
        ("store", True),
        ("service_tier", "auto"),
    ],
)
def test_harmless_fields_are_accepted(client: TestClient, path: str, field: str, value: Any) -> None:
    assert post(client, path, **{field: value}).status_code == 200


@both
@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("best_of", 1, 2),
        ("skip_special_tokens", True, False),
    ],
)
def test_unsupported_fields_may_be_neutral(client: TestClient, path: str, field: str, neutral: Any, other: Any) -> None:
    assert post(client, path, **{field: neutral}).status_code == 200
    assert post(client, path, **{field: None}).status_code == 200
    error = error_of(post(client, path, **{field: other}))
    assert (error["code"], error["param"]) == ("unsupported_value", field)


@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("tools", [], [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto", "required"),
        ("parallel_tool_calls", False, 3),
        ("function_call", "none", {"name": "f"}),
        ("modalities", ["text"], ["audio"]),
        ("audio", None, {"voice": "x"}),
        ("prediction", None, {"type": "content", "content": "x"}),
        ("reasoning_effort", "none", "high"),
        ("verbosity", None, "low"),
        ("web_search_options", None, {}),
        ("chat_template_kwargs", {}, {"enable_thinking": False}),
    ],
)
def test_unsupported_chat_fields_may_be_neutral(client: TestClient, field: str, neutral: Any, other: Any) -> None:
    assert post(client, CHAT, **{field: neutral}).status_code == 200
    error = error_of(post(client, CHAT, **{field: other}))
    assert (error["code"], error["param"]) == ("unsupported_value", field)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        (COMPLETIONS, "temperatur_"),
        (COMPLETIONS, "max_completion_tokens"),
        (COMPLETIONS, "messages"),
        (COMPLETIONS, "top_logprobs"),
        (CHAT, "temperatur_"),
        (CHAT, "prompt"),
        (CHAT, "echo"),
        (CHAT, "guided_json"),
    ],
)
@pytest.mark.parametrize("value", [5, None, "x", []])
def test_unknown_fields_are_rejected_by_name(client: TestClient, path: str, field: str, value: Any) -> None:
    error = error_of(post(client, path, **{field: value}))
    assert error["message"] == f"unknown field '{field}': omit it"
    assert (error["code"], error["param"]) == ("unknown_parameter", field)


def test_unknown_fields_inside_of_fields_are_rejected(client: TestClient) -> None:
    options = {"include_usage": True, "usage": True}
    assert error_of(post(client, COMPLETIONS, stream=True, stream_options=options))["param"] == "usage"
    part = {"type": "text", "text": "the", "color": "red"}
    assert error_of(post(client, CHAT, messages=[{"role": "user", "content": [part]}]))["param"] == "color"
    del part["color"]
    options = {"include_usage": True, "include_obfuscation": False}
    messages = [{"role": "user", "content": [{**part, "cache_control": {"type": "ephemeral"}}]}]
    assert post(client, CHAT, messages=messages, stream=True, stream_options=options).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"temperature": "0.5"}, "temperature"),
        (COMPLETIONS, {"temperature": -0.1}, "temperature"),
        (COMPLETIONS, {"temperature": 2.1}, "temperature"),
        (COMPLETIONS, {"temperature": True}, "temperature"),
        (COMPLETIONS, {"top_p": 1.1}, "top_p"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": -1}, "max_tokens"),
        (COMPLETIONS, {"n": 0}, "n"),
        (COMPLETIONS, {"n": 4}, "n"),
        (CHAT, {"n": 129}, "n"),
        (COMPLETIONS, {"frequency_penalty": 2.1}, "frequency_penalty"),
        (COMPLETIONS, {"presence_penalty": -2.1}, "presence_penalty"),
        (COMPLETIONS, {"logit_bias": {"x": 1}}, "logit_bias"),
        (COMPLETIONS, {"logit_bias": {"-1": 1}}, "logit_bias"),
        (COMPLETIONS, {"logit_bias": {"300": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"5": 101}}, "logit_bias.5"),
        (COMPLETIONS, {"top_k": -2}, "top_k"),
        (COMPLETIONS, {"min_p": 1.1}, "min_p"),
        (COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty"),
        (COMPLETIONS, {"min_tokens": 3}, "min_tokens"),
        (COMPLETIONS, {"stop_token_ids": [300]}, "stop_token_ids"),
        (COMPLETIONS, {"stop_token_ids": [-1]}, "stop_token_ids.0"),
        (COMPLETIONS, {"ignore_eos": 1}, "ignore_eos"),
        (COMPLETIONS, {"echo": "yes"}, "echo"),
        (COMPLETIONS, {"max_tokens": 1.5}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": True}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": 2**31}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": 2**31 - 1}, "prompt"),
        (COMPLETIONS, {"seed": 2**63}, "seed"),
        (COMPLETIONS, {"seed": 0.5}, "seed"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"stream": 1}, "stream"),
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream"),
        (COMPLETIONS, {"prompt": [True]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 5]}, "prompt"),
        (COMPLETIONS, {"prompt": [[5], ["a"]]}, "prompt"),
        (COMPLETIONS, {"prompt": {"text": "a"}}, "prompt"),
        (COMPLETIONS, {"prompt": [2**64]}, "prompt"),
        (COMPLETIONS, {"model": 5}, "model"),
        (CHAT, {"logprobs": 5}, "logprobs"),
        (CHAT, {"top_logprobs": 5}, "top_logprobs"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "the"}, "messages"),
        (CHAT, {"messages": [{"content": "the"}]}, "messages.0.role"),
    ],
)
def test_values_that_are_wrong_are_rejected(client: TestClient, path: str, fields: dict[str, Any], param: str) -> None:
    assert error_of(post(client, path, **fields))["param"] == param


def test_a_seed_may_be_any_64_bit_number(client: TestClient) -> None:
    for seed in (-(2**63), 2**63 - 1):
        assert post(client, COMPLETIONS, seed=seed).status_code == 200


@pytest.mark.parametrize("own", ["abc-123_x.y:z", "a" * 128])
def test_the_request_id_of_the_client_is_returned(client: TestClient, own: str) -> None:
    headers = {"x-request-id": own}
    assert client.get("/health", headers=headers).headers["x-request-id"] == own
    assert client.get("/nothing", headers=headers).headers["x-request-id"] == own


@pytest.mark.parametrize("own", ["", "a" * 129, "a b", "<script>", "é".encode(), "a\tb"])
def test_other_request_ids_are_replaced(client: TestClient, own: Any) -> None:
    found = client.get("/health", headers={"x-request-id": own}).headers["x-request-id"]
    assert re.fullmatch(r"req_[0-9a-f]{32}", found)


def test_every_response_has_a_request_id(
    client: TestClient, engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses: list[Any] = [
        client.get("/v1/models"),
        client.get("/metrics"),
        client.get("/nothing"),
        client.delete("/v1/completions"),
        client.post("/v1/completions", content=b"{"),
        post(client, COMPLETIONS),
        post(client, COMPLETIONS, stream=True),
        post(client, CHAT, unknown=1),
    ]

    def fail(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("/srv/models/secret.safetensors")

    monkeypatch.setattr(type(engine.tokenizer), "__call__", fail)
    responses.append(post(client, COMPLETIONS))
    assert [response.status_code for response in responses] == [200, 200, 404, 405, 415, 200, 200, 400, 500]
    ids = {response.headers["x-request-id"] for response in responses}
    assert len(ids) == len(responses)
    error = responses[-1].json()["error"]
    assert error["message"] == "internal error: RuntimeError: see the log of the server"
    assert error["type"] == "server_error"


def test_models_have_the_fields_of_other_servers(client: TestClient) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert {name: card[name] for name in ("id", "root", "parent", "max_model_len")} == {
        "id": "tiny",
        "root": "tiny",
        "parent": None,
        "max_model_len": 64,
    }


def test_a_dead_engine_is_not_healthy(engine: DecodeEngine) -> None:
    scheduler = Scheduler(engine)
    with TestClient(create_app(scheduler, "tiny")) as client:
        assert client.get("/health").json() == {"status": "ok"}
        scheduler.failure = ServingError("the engine has stopped: see the log of the server")
        response = client.get("/health")
        assert error_of(response, 503)["message"] == "the engine has stopped: see the log of the server"
        scheduler.failure = None
        assert client.get("/health").status_code == 200
