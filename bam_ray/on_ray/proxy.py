"""A middleware of Ray Serve's HTTP proxy: responses whose replica dies end with an error that clients understand.

When a replica is killed, the proxy knows no more of its requests. Without this middleware, it closes their connections.
With it, a stream ends with an event that has the error, and a request that has no response yet gets status 503.

The proxy imports `middlewares` because of its environment (`PROXY_ENVIRONMENT`).
"""

import json
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROXY_ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "bam_ray.on_ray.proxy.middlewares"}
ERROR = {
    "message": "the replica that computed this response has died: retry",
    "type": "server_error",
    "param": None,
    "code": "server_error",
}
HEADERS = [(b"content-type", b"application/json"), (b"retry-after", b"1")]


def middlewares() -> list[Middleware]:
    """Return the middlewares of the proxy. Ray Serve calls this."""
    return [Middleware(LostReplicas)]


class LostReplicas:
    """Ends the responses that the app below leaves unfinished."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI defines it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response = _Response(send)
        await self._app(scope, receive, response.send)
        await response.finish()


class _Response:
    """One response on its way to the client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._headers: dict[bytes, bytes] | None = None  # None: the response has not begun
        self._finished = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._headers = {name.lower(): value for name, value in message.get("headers", ())}
        self._finished = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def finish(self) -> None:
        if self._finished:
            return
        body: dict[str, Any] = {"type": "http.response.body", "more_body": False}
        if self._headers is None:
            await self._send({"type": "http.response.start", "status": 503, "headers": HEADERS})
            await self._send({**body, "body": json.dumps({"error": ERROR}).encode()})
        elif self._headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            await self._send({**body, "body": f"data: {json.dumps({'error': ERROR})}\n\n".encode()})
