"""Responses that follow a JSON schema, a regular expression or a list of choices."""

import builtins
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from fastapi.testclient import TestClient
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bam_ray.serving import DecodeEngine, SamplingParams, Scheduler, create_app
from bam_ray.serving.grammar import regex_grammar
from tests.support.decoding import prompts_of, run

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "mat"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "cats", "schema": SCHEMA, "strict": True}}


@pytest.fixture
def client(models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Iterator[TestClient]:
    engine = DecodeEngine(models_by_family["bam-prefix"], tokenizer, slots=4, max_length=160)
    with TestClient(create_app(Scheduler(engine), "tiny")) as client:
        yield client


def ask(client: TestClient, path: str = COMPLETIONS, **fields: Any) -> Any:
    """Return the response to a request that samples with a temperature."""
    content = {"messages": [{"role": "user", "content": "the"}]} if path == CHAT else {"prompt": "the"}
    body = {"model": "tiny", "max_tokens": 100, "temperature": 1.0, "seed": 3, **content, **fields}
    return client.post(path, json=body)


def texts(response: Any) -> list[str]:
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_json_follows_its_schema(client: TestClient, path: str) -> None:
    for text in texts(ask(client, path, response_format=JSON_SCHEMA, n=3)):
        jsonschema.validate(json.loads(text), SCHEMA)
    (text,) = texts(ask(client, path, structured_outputs={"json": SCHEMA}))
    jsonschema.validate(json.loads(text), SCHEMA)


def test_a_json_object_is_always_valid_json(client: TestClient) -> None:
    response = ask(client, response_format={"type": "json_object"}, logit_bias={"93": 3}, max_tokens=150).json()
    text, reason = response["choices"][0]["text"], response["choices"][0]["finish_reason"]
    assert text.startswith("{")
    assert reason == "length" or isinstance(json.loads(text), dict)


def test_text_matches_a_regular_expression(client: TestClient) -> None:
    for text in texts(ask(client, structured_outputs={"regex": r"[0-9]{3}-(cat|mat)"}, n=3)):
        assert re.fullmatch(r"[0-9]{3}-(cat|mat)", text)


def test_one_of_several_texts_is_chosen(client: TestClient) -> None:
    choices = ["yes", "no", 'a "quote"', "naïve ☕"]
    assert set(texts(ask(client, structured_outputs={"choice": choices}, n=4))) <= set(choices)
    assert texts(ask(client, structured_outputs={"choice": ["naïve ☕"]})) == ["naïve ☕"]


def test_other_requests_are_not_affected(
    models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = DecodeEngine(models_by_family["llama"], tokenizer, slots=3, max_length=64)
    prompts = prompts_of(3, engine.vocab_size)
    free = SamplingParams(max_tokens=8, temperature=1.0, seed=1)
    bound = SamplingParams(max_tokens=8, temperature=1.0, seed=1, grammar=regex_grammar("[ab]{3}"))
    kinds = [free, bound, free]
    alone = []
    for prompt, params in zip(prompts, kinds, strict=True):
        alone += run(engine, [prompt], lambda _, params=params: params)
    together = run(engine, prompts, lambda index: kinds[index])
    assert [each.text for each in together] == [each.text for each in alone]
    assert re.fullmatch("[ab]{3}", together[1].text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structured_outputs": {"regex": "(["}}, "the grammar cannot be used"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is needed"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}},
            "json_schema is needed",
        ),
        ({"structured_outputs": {"json": {"type": "cat"}}}, "the grammar cannot be used"),
        ({"structured_outputs": {}}, "exactly one of json, regex and choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "exactly one of json, regex and choice"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "omit one of them"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens does not work"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos does not work"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"grammar": "root ::= a"}}, "unknown field 'grammar'"),
    ],
)
def test_wrong_forms_are_refused(client: TestClient, fields: dict[str, Any], message: str) -> None:
    response = ask(client, **fields)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert texts(ask(client, response_format={"type": "text"}, structured_outputs={"choice": ["a"]})) == ["a"]


def test_a_server_without_the_package_says_so(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return load(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    response = ask(client, response_format=JSON_SCHEMA)
    assert response.status_code == 400
    assert "pip install 'bam-ray[structured]'" in response.json()["error"]["message"]
