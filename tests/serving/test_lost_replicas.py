"""Responses whose replica dies: the middleware of the proxy."""

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from bam_ray.on_ray.proxy import middlewares

START = "http.response.start"
BODY = "http.response.body"


def sent(messages: list[dict[str, Any]], kind: str = "http") -> list[Message]:
    """Return what a client receives from an app that sends `messages` and ends."""
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        received.append(message)

    (middleware,) = middlewares()
    asyncio.run(middleware.cls(app, *middleware.args, **middleware.kwargs)({"type": kind}, receive, send))
    return received


def start(content_type: str) -> dict[str, Any]:
    """Return the begin of a response."""
    return {"type": START, "status": 200, "headers": [(b"Content-Type", content_type.encode())]}


@pytest.mark.parametrize("content_type", ["text/event-stream; charset=utf-8", "application/json"])
def test_whole_responses_are_left_as_they_are(content_type: str) -> None:
    for bodies in (
        [{"type": BODY, "body": b"data: 1\n\n"}],
        [{"type": BODY, "body": b"data: 1\n\n", "more_body": True}, {"type": BODY, "body": b""}],
    ):
        messages = [start(content_type), *bodies]
        assert sent(messages) == messages


def test_a_stream_without_an_end_gets_an_error_event() -> None:
    messages = [start("text/event-stream"), {"type": BODY, "body": b"data: 1\n\n", "more_body": True}]
    *before, last = sent(messages)
    assert before == messages
    assert not last["more_body"]
    event = last["body"].decode()
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    error = json.loads(event.removeprefix("data: "))["error"]
    assert (error["type"], error["message"].endswith("has died: retry")) == ("server_error", True)


def test_a_request_without_a_response_gets_status_503() -> None:
    begin, body = sent([])
    assert (begin["status"], dict(begin["headers"])[b"retry-after"]) == (503, b"1")
    assert json.loads(body["body"])["error"]["code"] == "server_error"


def test_other_unfinished_messages_stay_unfinished() -> None:
    half = [start("application/json"), {"type": BODY, "body": b'{"id": ', "more_body": True}]
    assert sent(half) == half  # the client notices that the connection was closed early
    assert sent([{"type": "websocket.close"}], "websocket") == [{"type": "websocket.close"}]
