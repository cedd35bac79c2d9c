"""Requests that must not harm the requests of others: each of these once did."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bam_ray.errors import Overloaded, ServingError
from bam_ray.serving import DecodeEngine, SamplingParams, Scheduler, create_app
from bam_ray.serving.detokenizer import HELD_TOKENS, MAX_PENDING_TOKENS, Detokenizer, TextStream
from bam_ray.serving.engine import Output
from bam_ray.serving.openai_types import ChatRequest, CompletionRequest
from bam_ray.serving.sampler import Sampled, TokenSampler
from tests.support.decoding import prompts_of, run

GREEDY = SamplingParams(max_tokens=6, temperature=0)


@pytest.fixture
def client(engine: DecodeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(Scheduler(engine), "tiny"), raise_server_exceptions=False) as client:
        yield client


def complete(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "the", "max_tokens": 2, **fields})


def test_many_wrong_biases_are_refused_at_once(client: TestClient) -> None:
    biases = {str(token): "" for token in range(90_000)}
    start = time.monotonic()
    response = complete(client, logit_bias=biases)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "logit_bias")
    assert time.monotonic() - start < 2


FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "tokens", "unknown", "tools", "user"})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=20),
    st.sampled_from(["\ud800", "tiny", "the cat", "user", "<|end|>", "json_object", "(a|"]),
)
KEYS = st.sampled_from(["role", "content", "type", "text", "json", "regex", "choice", "include_usage", "5", "-1", "x"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_fields_are_a_server_error(client: TestClient, path: str, fields: dict[str, Any]) -> None:
    required: dict[str, Any] = {
        "/v1/completions": {"prompt": "the", "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "the"}], "max_tokens": 2},
        "/tokenize": {"prompt": "the"},
        "/detokenize": {"tokens": [5]},
    }[path]
    body = json.dumps({"model": "tiny", **required, **fields}).encode()
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert len(response.json()["error"]["message"].splitlines()) == 1
    assert '"server_error"' not in response.text


@pytest.mark.parametrize("stream", [True, False])
def test_the_echo_of_a_lone_surrogate_can_be_sent(client: TestClient, stream: bool) -> None:
    body = {"model": "tiny", "prompt": "a\ud800", "echo": True, "max_tokens": 2, "stream": stream}
    headers = {"content-type": "application/json"}
    response = client.post("/v1/completions", content=json.dumps(body).encode(), headers=headers)
    assert response.status_code == 200
    assert "error" not in response.text


def test_the_test_of_the_engine_leaves_other_requests_alone(
    models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = DecodeEngine(models_by_family["llama"], tokenizer, slots=3, max_length=64)
    (prompt,) = prompts_of(1, engine.vocab_size)
    (expected,) = run(engine, [prompt], lambda _: GREEDY)
    generation = engine.add(prompt, GREEDY)
    found = []
    while engine.active:
        engine.test()
        found += [output.sampled.token for _, output in engine.step() if output.sampled is not None]
    assert found == [*expected.tokens]
    assert generation.sampling.generated == GREEDY.max_tokens


def test_tokens_that_the_model_lacks_are_no_stop_tokens(
    models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    larger = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    larger.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    engine = DecodeEngine(models_by_family["llama"], larger, slots=2, max_length=64)
    assert larger.convert_tokens_to_ids("<extra>") >= engine.vocab_size
    params = SamplingParams(max_tokens=4, temperature=0, stop=("<extra>",), min_tokens=2)
    (output,) = run(engine, prompts_of(1, engine.vocab_size), lambda _: params)
    assert output.finish_reason == "length"


def test_an_error_at_the_start_of_a_request_frees_its_memory(
    engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = TokenSampler.start

    def failing(self: TokenSampler, state: Any) -> None:
        if state.params.penalizes:
            raise torch.OutOfMemoryError("out of memory")
        start(self, state)

    monkeypatch.setattr(TokenSampler, "start", failing)

    async def main() -> None:
        scheduler = Scheduler(engine)
        with pytest.raises(ServingError, match="out of memory"):
            await tokens_of(scheduler, SamplingParams(max_tokens=3, presence_penalty=1.0))
        assert scheduler.failure is None
        assert len(await tokens_of(scheduler, GREEDY)) == GREEDY.max_tokens
        await scheduler.close()

    asyncio.run(main())
    assert (engine.active, engine.free) == (0, engine.slots)


def test_numbers_that_are_not_finite_stay_in_their_request(
    models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models_by_family["llama"]
    engine = DecodeEngine(model, tokenizer, slots=3, max_length=64)
    prompts = [[5] * 12, [6, 7, 8]]
    expected = run(engine, prompts, lambda _: GREEDY)
    embeddings = model.get_input_embeddings()
    forward = embeddings.forward
    monkeypatch.setattr(
        embeddings, "forward", lambda ids: torch.where((ids == 9).unsqueeze(-1), torch.nan, forward(ids))
    )
    for _ in range(engine.slots):
        poisoned = engine.add([9] * 20, GREEDY)
        outputs = [output for generation, output in engine.step() if generation is poisoned]
        assert outputs[-1].error is not None
    assert [each.tokens for each in run(engine, prompts, lambda _: GREEDY)] == [each.tokens for each in expected]


async def tokens_of(scheduler: Scheduler, params: SamplingParams, tenant: str = "") -> list[int]:
    tokens: list[int] = []
    async with aclosing(scheduler.generate([[5, 6]], params, tenant=tenant)) as batches:
        async for batch in batches:
            tokens += [token for _, delta in batch for token in delta.tokens]
    return tokens


def test_a_tenant_that_fills_the_queue_leaves_room_for_others(engine: DecodeEngine) -> None:
    async def main() -> None:
        scheduler = Scheduler(engine, max_queued_prompts=16)
        eve = [asyncio.create_task(tokens_of(scheduler, GREEDY, "eve")) for _ in range(30)]
        await asyncio.sleep(0)
        bob = asyncio.create_task(tokens_of(scheduler, GREEDY, "bob"))
        results = await asyncio.gather(*eve, return_exceptions=True)
        assert any(isinstance(result, Overloaded) for result in results)
        assert len(await bob) == GREEDY.max_tokens
        await scheduler.close()

    asyncio.run(main())


def test_a_scheduler_that_is_closed_refuses_requests(engine: DecodeEngine) -> None:
    async def main() -> None:
        scheduler = Scheduler(engine)
        await tokens_of(scheduler, GREEDY)
        await scheduler.close()
        with pytest.raises(ServingError, match="the server is shutting down"):
            await asyncio.wait_for(tokens_of(scheduler, GREEDY), 5)

    asyncio.run(main())


def test_text_that_never_completes_a_character_is_sent(tokenizer: PreTrainedTokenizerFast) -> None:
    byte = tokenizer.convert_tokens_to_ids("ÿ")  # the byte 0xFF, which is in no character
    generator = torch.Generator().manual_seed(0)
    broken = [int(token) for token in torch.randint(1, 260, (200,), generator=generator)]
    for tokens in ([byte] * 200, broken):
        detokenizer, pieces = Detokenizer(tokenizer), []
        for token in tokens:
            pieces.append(detokenizer.feed(token))
        assert "".join([*pieces, detokenizer.flush()]) == tokenizer.decode(tokens, skip_special_tokens=True)
    first = next(i for i, piece in enumerate(map(Detokenizer(tokenizer).feed, [byte] * 200)) if piece)
    assert first == MAX_PENDING_TOKENS > HELD_TOKENS


def test_stop_strings_wait_for_the_least_number_of_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    (token,) = tokenizer("c").input_ids
    stream = TextStream(tokenizer, SamplingParams(max_tokens=9, stop=("c",), min_tokens=4))
    deltas = [stream.feed(Output(Sampled(token, True))) for _ in range(4)]
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("c", None)] * 3 + [("", "stop")]
