"""The paths that convert text to tokens and back."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from transformers import PreTrainedTokenizerFast

from bam_ray.serving import DecodeEngine, Scheduler, create_app

TEXT = "naïve café ☕"


@pytest.fixture
def client(engine: DecodeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(Scheduler(engine), "tiny")) as client:
        yield client


def test_tokens_of_a_text_and_back(client: TestClient, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer(TEXT).input_ids
    expected = {"count": len(tokens), "max_model_len": 64, "tokens": tokens, "token_strs": None}
    assert client.post("/tokenize", json={"model": "tiny", "prompt": TEXT}).json() == expected
    named = client.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True}).json()
    assert named["token_strs"] == tokenizer.convert_ids_to_tokens(tokens)
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": TEXT}
    assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {"prompt": TEXT, "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": [5]}, 400, "prompt"),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a" * 100_000}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "messages"),
        ("/detokenize", {"tokens": [300]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [5] * 65}, 400, "tokens"),
        ("/detokenize", {"tokens": TEXT}, 400, "tokens"),
    ],
)
def test_wrong_requests_are_refused(
    client: TestClient, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
