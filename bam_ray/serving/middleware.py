"""Middleware: what holds for every request before it reaches a route. The order is that of the classes here.

All classes are plain ASGI middleware, which passes streams on without buffering.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bam_ray.errors import ServingError
from bam_ray.serving.error_responses import ErrorResponder
from bam_ray.serving.openai_types import RequestError
from bam_ray.serving.tenants import Tenant, Tenants

_logger = logging.getLogger(__name__)

OPEN_PATHS = {"/", "/health"}  # the page has no data and asks for the key, and load balancers have none
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PORT = re.compile(r":\d*$")


class RequestIds:
    """Middleware that adds `x-request-id` to every response, and responds with status 500 to unexpected errors.

    The id is the client's own if it is short and plain, and a new one otherwise.
    """

    def __init__(self, app: ASGIApp, errors: ErrorResponder, add_header: bool) -> None:
        self._app, self._errors, self._add_header = app, errors, add_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        own = Headers(scope=scope).get("x-request-id", "")
        request_id = own if _SANE_REQUEST_ID.fullmatch(own) else f"req_{uuid.uuid4().hex}"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._add_header:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _logger.exception("request %s failed", request_id)
            if started:
                raise  # the server closes the connection
            reason = ServingError(f"internal error: {type(error).__name__}: see the log of the server")
            await self._errors.response(reason)(scope, receive, send_with_id)


class Gate:
    """Middleware that admits requests by the name of the server, the API key, and the limits of the key.

    Routes find the admission of their request as `request.scope["admission"]`.
    """

    def __init__(
        self, app: ASGIApp, errors: ErrorResponder, tenants: Tenants, allowed_hosts: Collection[str] | None
    ) -> None:
        self._app, self._errors, self._tenants, self._allowed_hosts = app, errors, tenants, allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it is admitted."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            tenant = self._tenant(scope["path"], headers)
        except RequestError as error:
            return await self._errors.response(error)(scope, receive, send)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(tenant.rate_headers())
            await send(message)

        if scope["method"] != "POST":  # it generates nothing
            return await self._app(scope, receive, send_with_limits)
        try:
            admission = tenant.admit()
        except RequestError as error:
            return await self._errors.response(error)(scope, receive, send_with_limits)
        scope["admission"] = admission
        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            admission.close()

    def _tenant(self, path: str, headers: Headers) -> Tenant:
        """Return the sender of a request. Raises `RequestError` if it needs a valid key."""
        return Tenant("") if path in OPEN_PATHS else self._tenants.authenticate(headers.get("authorization"))

    def _check_host(self, headers: Headers) -> None:
        """Raise `RequestError` for the name of another host.

        A web page can give its own name the address of this machine, and then send requests to it (DNS rebinding).
        """
        name = _PORT.sub("", headers.get("host", "")).lower()
        if self._allowed_hosts is not None and name not in self._allowed_hosts:
            message = "this server answers only to names of its own machine: use 127.0.0.1, or configure API keys"
            raise RequestError(400, message)


class BodyLimit:
    """Middleware that bounds the size of a request's body, and the time in which the client sends it."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on. The route that reads too long a body gets an `HTTPException` (413 or 408)."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "")
        announced = int(length) if re.fullmatch(r"[0-9]{1,19}", length) else 0
        deadline = asyncio.get_running_loop().time() + self._seconds
        size, complete = 0, False

        async def receive_limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            self._check(announced)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                reason = f"the body did not arrive within {self._seconds:g} s: send it faster"
                raise HTTPException(408, reason, {"connection": "close"}) from None
            size += len(message.get("body", b""))
            self._check(size)
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_limited, send)

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise HTTPException(413, f"the body has more than {self._max_bytes} bytes: send less at once")
