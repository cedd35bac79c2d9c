"""The order of the events of a stream is that of OpenAI's API."""

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import openai
import pytest

from bam_ray.errors import ServingError
from bam_ray.serving import DecodeEngine, Scheduler, create_app
from bam_ray.serving.engine import Delta
from bam_ray.serving.sampling import TokenLogprob
from tests.support.http_server import running_server

Batch = list[tuple[int, Delta]]
END = Delta(tokens=(0,), finish_reason="stop")
LOGPROB = TokenLogprob(b"a", -0.5, (TokenLogprob(b"a", -0.5),))
ROLE, FAILED = "the role", "the model failed"


class ScriptedScheduler(Scheduler):
    """A scheduler that yields prepared output."""

    script: list[Batch | ServingError]

    async def generate(self, prompts: Any, *arguments: Any, **settings: Any) -> AsyncGenerator[Batch, None]:
        for item in self.script:
            if isinstance(item, ServingError):
                raise item
            yield item


@pytest.fixture
def scheduler(engine: DecodeEngine) -> ScriptedScheduler:
    return ScriptedScheduler(engine)


@pytest.fixture
def client(scheduler: ScriptedScheduler) -> Iterator[openai.OpenAI]:
    with (
        running_server(create_app(scheduler, "tiny")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def text(*pieces: str) -> Delta:
    return sum((Delta(piece, (5,)) for piece in pieces), Delta())


SCRIPTS: dict[str, tuple[list[Batch | ServingError], list[Any]]] = {
    "one piece at a time": (
        [[(0, text("a"))], [(0, text("b"))], [(0, END)]],
        ["a", "b", "stop"],
    ),
    "the end comes with text": ([[(0, text("a") + Delta("b", (5,), (), "length"))]], ["ab", "length"]),
    "no text": ([[(0, END)]], ["stop"]),
    "tokens without text": ([[(0, text(""))], [(0, text("a"))], [(0, text(""))], [(0, END)]], ["a", "stop"]),
    "an error": ([[(0, text("a"))], ServingError(FAILED)], ["a", FAILED]),
}


def read(chunks: Iterator[Any]) -> Iterator[Any]:
    """Yield the chunks of a stream, and the message of an error that ends it."""
    try:
        yield from chunks
    except openai.APIError as error:
        yield error.message


def chat_part(chunk: Any) -> Any:
    """Return what a chunk is for, after checks of its form."""
    if isinstance(chunk, str):
        return chunk
    if not chunk.choices:
        return "usage" if chunk.usage else "nothing"
    (choice,) = chunk.choices
    delta = choice.delta.model_dump(exclude_unset=True)
    if choice.finish_reason is not None:
        assert delta == {}
        return choice.finish_reason
    assert chunk.usage is None
    assert delta == {"role": "assistant", "content": ""} or delta == {"content": choice.delta.content}
    return ROLE if "role" in delta else choice.delta.content


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("usage", [True, False])
def test_chat_chunks(client: openai.OpenAI, scheduler: ScriptedScheduler, name: str, usage: bool) -> None:
    scheduler.script, expected = SCRIPTS[name]
    messages: Any = [{"role": "user", "content": "the"}]
    options: Any = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = client.chat.completions.create(model="tiny", messages=messages, stream=True, **options)
    failed = expected[-1] == FAILED
    assert [chat_part(chunk) for chunk in read(chunks)] == [
        ROLE,
        *expected,
        *(["usage"] if usage and not failed else []),
    ]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("usage", [True, False])
def test_completion_chunks(client: openai.OpenAI, scheduler: ScriptedScheduler, name: str, usage: bool) -> None:
    scheduler.script, expected = SCRIPTS[name]
    options: Any = {"stream_options": {"include_usage": True}} if usage else {}
    seen: list[Any] = []
    for chunk in read(client.completions.create(model="tiny", prompt="the", stream=True, **options)):
        if isinstance(chunk, str) or not chunk.choices:
            seen.append(chunk if isinstance(chunk, str) else "usage")
            continue
        (choice,) = chunk.choices
        assert not (choice.text and choice.finish_reason)
        seen.append(choice.finish_reason or choice.text)
    failed = expected[-1] == FAILED
    assert seen == [*expected, *(["usage"] if usage and not failed else [])]


def events(client: openai.OpenAI, path: str, **fields: Any) -> list[str]:
    response = httpx.post(f"{client.base_url}{path}", json={"model": "tiny", "stream": True, **fields})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in response.text.removesuffix("\n\n").split("\n\n")]


def test_a_stream_ends_with_done_or_an_error(client: openai.OpenAI, scheduler: ScriptedScheduler) -> None:
    scheduler.script = [[(0, text("a"))], [(0, END)]]
    assert events(client, "completions", prompt="the")[-1] == "[DONE]"
    scheduler.script = [[(0, text("a"))], ServingError(FAILED)]
    *_, last = events(client, "completions", prompt="the")
    assert json.loads(last)["error"]["message"] == "the model failed"


@pytest.mark.parametrize("stream", [True, False])
def test_an_early_error_is_no_stream(client: openai.OpenAI, scheduler: ScriptedScheduler, stream: bool) -> None:
    scheduler.script = [ServingError(FAILED)]
    with pytest.raises(openai.InternalServerError, match="the model failed"):
        client.completions.create(model="tiny", prompt="the", stream=stream)


def test_each_prompt_ends_once(client: openai.OpenAI, scheduler: ScriptedScheduler) -> None:
    scheduler.script = [[(0, text("a")), (1, text("x") + END)], [(0, text("b"))], [(0, END)]]
    chunks = client.completions.create(model="tiny", prompt=["a", "b"], stream=True)
    seen = [(choice.index, choice.text, choice.finish_reason) for chunk in chunks for choice in chunk.choices]
    assert seen == [(0, "a", None), (1, "x", None), (1, "", "stop"), (0, "b", None), (0, "", "stop")]


def test_log_probabilities_come_with_the_text(client: openai.OpenAI, scheduler: ScriptedScheduler) -> None:
    end = Delta("", (0,), (LOGPROB,), "stop")  # the end token has one, but no text
    scheduler.script = [[(0, Delta("a", (5,), (LOGPROB,)))], [(0, end)]]
    messages: Any = [{"role": "user", "content": "the"}]
    chunks = client.chat.completions.create(model="tiny", messages=messages, stream=True, logprobs=True)
    seen = [
        (choice.delta.content, len(choice.logprobs.content or []) if choice.logprobs else 0, choice.finish_reason)
        for chunk in chunks
        for choice in chunk.choices
    ]
    assert seen == [("", 0, None), ("a", 1, None), ("", 1, None), (None, 0, "stop")]
