"""The HTTP endpoint, called with the `openai` client."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import torch

from bam_ray.serving import DecodeEngine, SamplingParams, Scheduler, create_app
from tests.support.decoding import run
from tests.support.http_server import running_server, wait_until

MODEL = "tiny"


@dataclass
class Endpoint:
    """A running server and a client."""

    engine: DecodeEngine
    scheduler: Scheduler
    client: openai.OpenAI
    url: str

    def generate_alone(self, prompt: str, max_tokens: int) -> str:
        """Return the greedy completion of one prompt by the engine, without the server."""
        tokens = self.engine.tokenizer(prompt).input_ids
        return run(self.engine, [tokens], lambda _: SamplingParams(max_tokens=max_tokens, temperature=0))[0].text


@pytest.fixture
def endpoint(engine: DecodeEngine) -> Iterator[Endpoint]:
    """Run the app on uvicorn in a thread."""
    scheduler = Scheduler(engine)
    with (
        running_server(create_app(scheduler, MODEL)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Endpoint(engine, scheduler, client, url)


def metric(endpoint: Endpoint, name: str) -> float:
    """Return the value of a metric, or 0 if it has not been counted yet."""
    lines = httpx.get(f"{endpoint.url}/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)


def slow_down(monkeypatch: pytest.MonkeyPatch, engine: DecodeEngine) -> None:
    """Make each step take 30 ms, so that requests can be observed while they run."""
    step = engine.step

    def slow_step(*args: Any) -> Any:
        time.sleep(0.03)
        return step(*args)

    monkeypatch.setattr(engine, "step", slow_step)


def test_completions(endpoint: Endpoint) -> None:
    prompts = ["the cat", "naïve ☕"]
    expected = [endpoint.generate_alone(prompt, 12) for prompt in prompts]
    answer = endpoint.client.completions.create(model=MODEL, prompt=prompts, max_tokens=12, temperature=0, logprobs=1)
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    read = sum(len(endpoint.engine.tokenizer(prompt).input_ids) for prompt in prompts)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (read, 24)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [next(iter(top.values())) for top in logprobs.top_logprobs or []]
    tokens = endpoint.engine.tokenizer(prompts[0]).input_ids
    again = endpoint.client.completions.create(model=MODEL, prompt=tokens, max_tokens=12, temperature=0)
    assert again.choices[0].text == expected[0]


def test_concurrent_streams_equal_the_engine_alone(endpoint: Endpoint) -> None:
    prompts = [f"the cat sat {word}" for word in ("on", "under", "by the mat", "", "☕", "in", "so", "a")]
    expected = [endpoint.generate_alone(prompt, 20 + i) for i, prompt in enumerate(prompts)]

    def stream(i: int) -> str:
        chunks = endpoint.client.completions.create(
            model=MODEL, prompt=prompts[i], max_tokens=20 + i, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(stream, range(len(prompts)))) == expected


def test_chat_completions(endpoint: Endpoint) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what is a mixture?"}]},
    ]
    expected = endpoint.generate_alone("system: be brief\nuser: what is a mixture?\nassistant:", 9)
    request: dict[str, Any] = {"model": MODEL, "messages": messages, "max_completion_tokens": 9, "temperature": 0}
    answer = endpoint.client.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content or []) == 9
    chunks = list(
        endpoint.client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 9)


def test_chat_template_of_the_tokenizer_is_used(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}>{{ messages[0].content }}"
    )
    monkeypatch.setattr(endpoint.engine.tokenizer, "chat_template", template)
    create = endpoint.client.chat.completions.create
    answer = create(model=MODEL, messages=[{"role": "user", "content": "cat"}], max_tokens=5, temperature=0)
    assert answer.choices[0].message.content == endpoint.generate_alone(">cat", 5)
    with pytest.raises(openai.BadRequestError, match="user first"):
        create(model=MODEL, messages=[{"role": "system", "content": "cat"}])


def test_equal_seeds_give_equal_text(endpoint: Endpoint) -> None:
    def text(seed: int) -> str:
        answer = endpoint.client.completions.create(model=MODEL, prompt="the", max_tokens=20, seed=seed, top_p=0.9)
        return answer.choices[0].text

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_stream_is_server_sent_events(endpoint: Endpoint) -> None:
    body = {"model": MODEL, "prompt": "the", "max_tokens": 3, "stream": True, "temperature": 0}
    response = httpx.post(f"{endpoint.url}/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-1])


@pytest.mark.parametrize("streamed", [True, False])
def test_a_disconnected_client_frees_its_slots(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    slow_down(monkeypatch, endpoint.engine)
    scheduler = endpoint.scheduler
    left = 'bam_requests_total{outcome="left"}'
    before, tokens_before = metric(endpoint, left), scheduler.totals.completion_tokens
    body = {"model": MODEL, "prompt": ["a"] * 4, "max_tokens": 50, "stream": streamed, "temperature": 0}
    if streamed:
        with httpx.stream("POST", f"{endpoint.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()  # keep a reference: httpx disconnects when the iterator is deleted
            next(lines)
            wait_until(lambda: scheduler.active == 3 and scheduler.waiting == 1)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{endpoint.url}/v1/completions", json=body, timeout=0.2)
    wait_until(lambda: metric(endpoint, left) == before + 1)
    wait_until(lambda: scheduler.active == 0 and scheduler.waiting == 0)
    wait_until(lambda: endpoint.engine.free == 3)  # the thread of the engine frees them in its next step
    assert scheduler.totals.completion_tokens - tokens_before < 150  # of 200


def test_serving_continues_after_the_model_fails(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = endpoint.generate_alone("the", 4)

    def broken(*args: Any) -> Any:
        raise RuntimeError("/home/secret/model.safetensors is broken")

    create = endpoint.client.completions.create
    with monkeypatch.context() as patch:
        patch.setattr(endpoint.engine, "step", broken)
        with pytest.raises(openai.InternalServerError, match="the model failed: see the log") as raised:
            create(model=MODEL, prompt="the", max_tokens=4)
        assert raised.value.body["type"] == "server_error"
        with pytest.raises(openai.APIError, match="the model failed: see the log"):
            list(create(model=MODEL, prompt="the", max_tokens=4, stream=True))
    assert create(model=MODEL, prompt="the", max_tokens=4, temperature=0).choices[0].text == expected


def test_a_prompt_without_memory_fails_alone(
    endpoint: Endpoint, models_by_family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = endpoint.generate_alone("the", 40)
    model = models_by_family["cohere"]
    forward = model.forward

    def limited_forward(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.shape[1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", limited_forward)
    slow_down(monkeypatch, endpoint.engine)
    create = endpoint.client.completions.create
    stream = create(model=MODEL, prompt="the", max_tokens=40, temperature=0, stream=True)
    text = next(stream).choices[0].text
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        create(model=MODEL, prompt=[5] * 30, max_tokens=4)
    assert endpoint.scheduler.active == 1, "the other request is still being decoded"
    assert text + "".join(chunk.choices[0].text for chunk in stream) == expected


@pytest.mark.parametrize(
    ("change", "status", "message", "code", "param"),
    [
        ({"model": "other"}, 404, "'other' is not served", "model_not_found", "model"),
        ({"prompt": [5] * 60}, 400, "at most 64 tokens", "context_length_exceeded", "prompt"),
        ({"prompt": [300]}, 400, "not in", None, "prompt"),
        ({"prompt": ""}, 400, "empty", None, "prompt"),
        ({"prompt": []}, 400, "empty", None, "prompt"),
        ({"n": 4}, 400, "lower n", None, "n"),
        ({"suffix": "x"}, 400, "suffix='x' is not supported", "unsupported_value", "suffix"),
        ({"stop": list("abcdefghijklmnopq")}, 400, "up to 16", None, "stop"),
        ({"temperature": -1}, 400, "temperature", None, "temperature"),
        ({"max_tokens": "many"}, 400, "max_tokens", None, "max_tokens"),
    ],
)
def test_invalid_requests_are_rejected(
    endpoint: Endpoint, change: dict[str, Any], status: int, message: str, code: str | None, param: str
) -> None:
    body = {"model": MODEL, "prompt": "the", "max_tokens": 10, **change}
    response = httpx.post(f"{endpoint.url}/v1/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == status
    assert message in error["message"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)


def test_all_errors_have_the_openai_format(endpoint: Endpoint) -> None:
    assert httpx.get(f"{endpoint.url}/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{endpoint.url}/v1/completions", content=b"{", headers=headers)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "the"}], "tools": tools}
    assert httpx.post(f"{endpoint.url}/v1/chat/completions", json=body).json()["error"]["param"] == "tools"


def test_models_health_and_metrics(endpoint: Endpoint) -> None:
    assert [model.id for model in endpoint.client.models.list()] == [MODEL]
    assert endpoint.client.models.retrieve(MODEL).id == MODEL
    assert httpx.get(f"{endpoint.url}/health").status_code == 200
    names = ['bam_requests_total{outcome="finished"}', 'vllm:prompt_tokens_total{model_name="tiny"}', "bam_steps_total"]
    before = [metric(endpoint, name) for name in names]
    endpoint.client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=7, temperature=0)
    assert [metric(endpoint, name) - old for name, old in zip(names, before, strict=True)] == [1, 3, 7]
    assert (
        metric(endpoint, 'vllm:generation_tokens_total{model_name="tiny"}')
        == endpoint.scheduler.totals.completion_tokens
    )
    assert (metric(endpoint, "bam_slots"), metric(endpoint, 'vllm:num_requests_running{model_name="tiny"}')) == (3, 0)


def test_metrics_have_the_names_of_vllm(endpoint: Endpoint) -> None:
    labels = f'model_name="{MODEL}"'
    names = [
        f"vllm:time_to_first_token_seconds_count{{{labels}}}",
        f"vllm:e2e_request_latency_seconds_count{{{labels}}}",
        f"vllm:inter_token_latency_seconds_count{{{labels}}}",
        f'vllm:request_success_total{{finished_reason="length",{labels}}}',
    ]
    before = [metric(endpoint, name) for name in names]
    endpoint.client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=7, temperature=0, n=2)
    first, whole, between, finished = (metric(endpoint, name) - old for name, old in zip(names, before, strict=True))
    assert (first, whole, finished) == (1, 1, 2)
    assert 1 <= between <= 12, "outputs that arrive together are one observation"
    assert metric(endpoint, f"vllm:kv_cache_usage_perc{{{labels}}}") == 0


def test_usage_and_metrics_count_cached_tokens(endpoint: Endpoint) -> None:
    labels = f'{{model_name="{MODEL}"}}'
    prompt = list(range(1, 41))
    request: Any = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0}
    usages = [endpoint.client.completions.create(**request).usage for _ in range(2)]
    *_, last = endpoint.client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    details = [usage.prompt_tokens_details for usage in (*usages, last.usage) if usage is not None]
    assert [each.cached_tokens for each in details if each is not None] == [0, 39, 39]
    assert metric(endpoint, f"vllm:prefix_cache_queries_total{labels}") == 120
    assert metric(endpoint, f"vllm:prefix_cache_hits_total{labels}") == 78
