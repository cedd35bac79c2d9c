"""Requests are bounded before they cost anything, and no client harms another one."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from bam_ray.serving import AppOptions, DecodeEngine, Scheduler, create_app
from tests.support.http_server import running_server, wait_until

MODEL = "tiny"
JSON = {"Content-Type": "application/json"}
OPTIONS = AppOptions(max_body_bytes=1 << 20, max_body_seconds=2, max_prompts=8, max_prompt_tokens=200)


@dataclass
class Served:
    """A running server with the limits of `OPTIONS`."""

    engine: DecodeEngine
    scheduler: Scheduler
    url: str

    @property
    def completions(self) -> str:
        return f"{self.url}/v1/completions"

    @property
    def chat(self) -> str:
        return f"{self.url}/v1/chat/completions"

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=10)

    def works(self) -> bool:
        """Return True if another client is served within a second."""
        body = {"model": MODEL, "prompt": "the", "max_tokens": 2}
        return httpx.post(self.completions, json=body, timeout=1).status_code == 200


@pytest.fixture
def served(engine: DecodeEngine) -> Iterator[Served]:
    scheduler = Scheduler(engine, max_queued_prompts=16, max_queued_tokens=400)
    with running_server(create_app(scheduler, MODEL, OPTIONS)) as url:
        yield Served(engine, scheduler, url)


@pytest.fixture(scope="module")
def shared(models_by_family: dict[str, Any], tokenizer: Any) -> Iterator[Served]:
    """Return a server for requests that change nothing."""
    engine = DecodeEngine(models_by_family["cohere"], tokenizer, slots=3, max_length=64)
    scheduler = Scheduler(engine)
    with running_server(create_app(scheduler, MODEL, OPTIONS)) as url:
        yield Served(engine, scheduler, url)


@pytest.fixture
def tokenized(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the texts that are tokenized, and the names of the threads that do it."""
    texts: list[str] = []
    tokenizer = type(served.engine.tokenizer)
    call = tokenizer.__call__

    def recording(self: Any, text: str, **settings: Any) -> Any:
        texts.append(f"{threading.current_thread().name.partition('_')[0]}: {text}")
        return call(self, text, **settings)

    monkeypatch.setattr(tokenizer, "__call__", recording)
    return texts


def error_of(response: Any) -> Any:
    """Return an error, which must be one line."""
    error = response.json()["error"]
    assert len(error["message"].splitlines()) == 1
    return error


def test_a_long_body_is_refused_before_it_arrives(served: Served) -> None:
    with served.connect() as client:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {100 << 20}"
        )
        client.sendall(f"{head}\r\n\r\n{{".encode())
        assert b"HTTP/1.1 413" in client.recv(1 << 16)
    assert served.works()


def test_a_long_body_without_a_length_is_refused(served: Served) -> None:
    chunks = (b" " * (1 << 16) for _ in range(100 << 4))  # 100 MiB
    response = httpx.post(served.completions, content=chunks, headers=JSON)
    assert (response.status_code, error_of(response)["type"]) == (413, "invalid_request_error")
    assert served.works()


def test_a_body_within_the_limit_is_served(served: Served) -> None:
    body = json.dumps({"model": MODEL, "prompt": "the", "max_tokens": 1}).encode()
    padded = body + b" " * (OPTIONS.max_body_bytes - len(body))
    assert httpx.post(served.completions, content=padded, headers=JSON).status_code == 200
    assert httpx.post(served.completions, content=padded + b" ", headers=JSON).status_code == 413


def test_a_client_that_sends_slowly_is_refused(served: Served) -> None:
    with served.connect() as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100"
        client.sendall(f"{head}\r\n\r\n".encode())
        start = time.monotonic()
        while time.monotonic() - start < 1:
            client.sendall(b" ")
            time.sleep(0.1)
        assert served.works()
        answer = client.recv(1 << 16)
        assert b"HTTP/1.1 408" in answer
        assert b"connection: close" in answer


@pytest.mark.parametrize("prompt", [["a"] * 9, [[5]] * 9, ["a"] * 100_000])
def test_too_many_prompts_are_refused(served: Served, tokenized: list[str], prompt: list[Any]) -> None:
    response = httpx.post(served.completions, json={"model": MODEL, "prompt": prompt})
    assert (response.status_code, error_of(response)["param"]) == (400, "prompt")
    assert "a request may have 8" in error_of(response)["message"]
    assert tokenized == []
    assert served.scheduler.waiting == 0


def test_too_many_tokens_of_all_prompts_are_refused(served: Served) -> None:
    response = httpx.post(served.completions, json={"model": MODEL, "prompt": [[5] * 41] * 5})
    assert (response.status_code, error_of(response)["param"]) == (400, "prompt")
    assert "205 tokens" in error_of(response)["message"]


def test_long_texts_are_refused_without_tokenization(served: Served, tokenized: list[str]) -> None:
    longest = max(map(len, served.engine.tokenizer.get_vocab()))
    limit = served.engine.max_length * longest
    bodies: list[tuple[str, dict[str, Any]]] = [
        (served.completions, {"prompt": "x" * (limit + 1)}),
        (served.completions, {"prompt": ["the", "x" * (limit + 1)]}),
        (served.completions, {"prompt": [5] * 65}),
        (served.chat, {"messages": [{"role": "user", "content": "x" * limit}]}),
    ]
    for url, body in bodies:
        response = httpx.post(url, json={"model": MODEL, **body})
        assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded"), body.keys()
    assert tokenized == []
    response = httpx.post(served.completions, json={"model": MODEL, "prompt": "x" * limit})
    assert error_of(response)["code"] == "context_length_exceeded"
    assert len(tokenized) == 1, "a text that could fit is tokenized"


def test_a_text_of_the_longest_tokens_fits(served: Served) -> None:
    vocabulary = served.engine.tokenizer.get_vocab()
    longest = max(vocabulary, key=len)
    response = httpx.post(served.completions, json={"model": MODEL, "prompt": longest * 63, "max_tokens": 1})
    assert response.json()["usage"]["prompt_tokens"] == 63


def test_text_is_tokenized_on_one_thread(served: Served, tokenized: list[str]) -> None:
    messages = [{"role": "user", "content": "cat"}]
    assert httpx.post(served.chat, json={"model": MODEL, "messages": messages, "max_tokens": 1}).status_code == 200
    assert (
        httpx.post(served.completions, json={"model": MODEL, "prompt": ["a", "b"], "max_tokens": 1}).status_code == 200
    )
    assert tokenized == ["tokenize: user: cat\nassistant:", "tokenize: a", "tokenize: b"]


def test_a_slow_template_delays_no_other_answer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()

    def wait(*arguments: Any, **settings: Any) -> str:
        began.set()
        assert go_on.wait(10)
        return "the"

    monkeypatch.setattr(served.engine.tokenizer, "apply_chat_template", wait)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "cat"}], "max_tokens": 1}
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(httpx.post, served.chat, json=body, timeout=20)
        assert began.wait(10)
        assert httpx.get(f"{served.url}/health", timeout=1).status_code == 200
        go_on.set()
        assert slow.result().status_code == 200


@pytest.mark.parametrize(
    ("stop", "accepted"),
    [
        (["a"] * 16, True),
        (["a"] * 17, False),
        ("a" * 256, True),
        ("a" * 257, False),
        (["a", "b" * 257], False),
        (["a", ""], False),
        (["a", 5], False),
        ([None] * 100_000, False),
    ],
)
def test_stop_strings_are_bounded(served: Served, stop: Any, accepted: bool) -> None:
    response = httpx.post(served.completions, json={"model": MODEL, "prompt": "the", "max_tokens": 1, "stop": stop})
    assert response.status_code == (200 if accepted else 400)
    if not accepted:
        assert error_of(response)["param"].startswith("stop")


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("field", ["metadata", "prompt", "stop", "n", "unknown"])
@pytest.mark.parametrize("depth", [65, 500, 970, 5_000, 200_000])
def test_deep_nesting_is_refused(served: Served, field: str, depth: int) -> None:
    body = f'{{"model": "{MODEL}", "max_tokens": 1, "{field}": {nested(depth)}}}'
    response = httpx.post(served.completions, content=body, headers=JSON)
    assert response.status_code == 400
    assert "nested too deeply" in error_of(response)["message"]


def test_shallow_nesting_is_accepted(served: Served) -> None:
    body = f'{{"model": "{MODEL}", "prompt": "the", "max_tokens": 1, "metadata": {nested(63)}}}'
    assert httpx.post(served.completions, content=body, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": ""}] * 1025,
        [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}],
        [5] * 100_000,
        [{"role": "user", "content": [5] * 100_000}],
    ],
)
def test_messages_are_bounded(served: Served, messages: list[Any]) -> None:
    start = time.monotonic()
    response = httpx.post(served.chat, json={"model": MODEL, "messages": messages})
    assert (response.status_code, len(error_of(response)["message"]) < 300) == (400, True)
    assert time.monotonic() - start < 5


def slow_down(monkeypatch: pytest.MonkeyPatch, engine: DecodeEngine, seconds: float) -> None:
    """Make each step of the engine slower."""
    step = engine.step

    def slow_step(*arguments: Any) -> Any:
        time.sleep(seconds)
        return step(*arguments)

    monkeypatch.setattr(engine, "step", slow_step)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_full_queue_is_an_error_before_the_answer(
    served: Served, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    slow_down(monkeypatch, served.engine, 0.05)
    body: dict[str, Any] = {"model": MODEL, "prompt": ["a"] * 8, "max_tokens": 40, "temperature": 0, "stream": streamed}
    with (
        ThreadPoolExecutor(2) as pool,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        requests = [pool.submit(httpx.post, served.completions, json=body, timeout=60) for _ in range(2)]
        wait_until(lambda: served.scheduler.waiting == 13)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**body)
        assert [request.result().status_code for request in requests] == [200, 200]
    response = refused.value.response
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "1000")
    assert error_of(response)["code"] == "server_overloaded"


@pytest.mark.parametrize("streamed", [True, False])
def test_a_vanished_client_leaves_the_queue_at_once(
    served: Served, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    slow_down(monkeypatch, served.engine, 0.1)
    body = {"model": MODEL, "prompt": ["a"] * 3, "max_tokens": 60, "temperature": 0}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, served.completions, json=body, timeout=60)
        wait_until(lambda: served.scheduler.active == 3)
        with served.connect() as client:
            text = json.dumps({**body, "stream": streamed}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length:"
            client.sendall(f"{head} {len(text)}\r\n\r\n".encode() + text)
            wait_until(lambda: served.scheduler.waiting == 3)
        start = time.monotonic()
        wait_until(lambda: served.scheduler.waiting == 0)
        assert time.monotonic() - start < 1, "the others still have seconds to go"
        assert served.scheduler.active == 3
        assert running.result().status_code == 200


def test_clients_that_vanish_at_any_time_leave_nothing(served: Served) -> None:
    text = json.dumps({"model": MODEL, "prompt": ["a"] * 4, "max_tokens": 20, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    request = f"{head}\r\n\r\n".encode() + text
    for sent in (1, 20, len(request) - len(text), len(request) - 1, len(request)):
        for seconds in (0, 0.01, 0.05):
            with served.connect() as client:
                client.sendall(request[:sent])
                time.sleep(seconds)
    wait_until(lambda: (served.scheduler.waiting, served.scheduler.active, served.engine.free) == (0, 0, 3))
    assert served.works()


def bodies() -> dict[str, str | bytes]:
    """Return bodies that no client should send."""
    odd: dict[str, Any] = {
        "negative": {"max_tokens": -1, "temperature": -1, "top_p": -1, "seed": -(2**80), "logprobs": -1},
        "huge": {"max_tokens": 10**30, "seed": 10**30, "logprobs": 10**30},
        "types": {"prompt": {}, "model": [], "stream": "yes", "max_tokens": True},
        "tokens": {"prompt": [-1, 10**30]},
        "mixed": {"prompt": ["a", 5]},
        "booleans": {"prompt": [True]},
        "empty": {"prompt": [[]]},
        "names": {"x" * 500_000: 1},
        "fields": {f"field{i}": i for i in range(20_000)},
        "surrogate": {"prompt": "\ud83d", "\ud83d": "\ud83d"},
    }
    texts: dict[str, str | bytes] = {
        name: json.dumps({"model": MODEL, "prompt": "the", **fields}) for name, fields in odd.items()
    }
    numbers = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-1e400", "0x1", "1.5.2")
    fields = ("temperature", "max_tokens", "user", "n")
    texts |= {
        f"{field} {n[:9]}": f'{{"model": "{MODEL}", "prompt": "the", "{field}": {n}}}'
        for n in numbers
        for field in fields
    }
    rest: dict[str, str | bytes] = {
        "no JSON": "hello",
        "nothing": "",
        "null": "null",
        "list": "[]",
        "zero bytes": b"\0" * 1000,
        "no UTF-8": b'{"model": "\xff\xfe"}',
        "UTF-16": json.dumps({"model": MODEL, "prompt": "the", "max_tokens": 1}).encode("utf-16"),
        "twice": '{"model": "tiny", "model": "tiny", "prompt": {}}',
    }
    return texts | rest


@pytest.mark.parametrize("name", bodies())
@pytest.mark.parametrize("path", ["completions", "chat"])
def test_no_body_is_a_server_error(shared: Served, name: str, path: str) -> None:
    response = httpx.post(getattr(shared, path), content=bodies()[name], headers=JSON)
    if response.status_code != 200:
        error = error_of(response)
        assert response.status_code == 400, error
        assert len(error["message"]) < 400
        assert not re.search(r"Traceback|/work|/tmp|\.py|pydantic|0x7f", response.text)
    assert response.headers["x-request-id"]
    assert "NaN" not in name or response.status_code == 400
    assert shared.works()
