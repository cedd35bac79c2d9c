"""The parts that all HTTP apps share: limits, JSON routes, middleware, and errors in OpenAI's format."""

import json
import re
import reprlib
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from bam_ray.errors import ServingError
from bam_ray.serving.error_responses import ErrorResponder
from bam_ray.serving.middleware import BodyLimit, Gate, RequestIds
from bam_ray.serving.openai_responses import ModelCard
from bam_ray.serving.openai_types import MAX_SHOWN, ErrorResponse, RequestError
from bam_ray.serving.tenants import Admission, Tenants
from bam_ray.settings.api_keys import ApiKey

_TYPE_NAME = re.compile(r"(str|int|float|bool)$|.*\[")  # of pydantic, for one type of a field that has several
MAX_NESTING = 64  # of lists and objects in a request
CONTAINERS = (dict, list)
MAX_CONTAINERS = 100_000  # lists and objects in a request; the garbage collector makes millions of them slow to read

ERRORS: dict[int | str, dict[str, Any]] = {
    kind: {"model": ErrorResponse, "description": description}
    for kind, description in (("4XX", "The request is refused"), ("5XX", "The server cannot serve the request"))
}
"""The error responses of all paths, for the description of the API."""


@dataclass(frozen=True)
class AppOptions:
    """The limits of requests, and who may send them."""

    api_keys: Sequence[ApiKey] = ()  # empty: everybody who can connect may send requests
    allowed_hosts: Collection[str] | None = None  # names of this server in the Host header; None: any
    max_body_bytes: int = 4 << 20
    max_body_seconds: float = 60.0  # the time in which a client must have sent the body
    max_prompts: int = 64  # of a request
    max_prompt_tokens: int = 1 << 20  # of all prompts of a request
    artifacts: Sequence[str] = ()  # `kind/id` of the models that are served, for /v1/models
    add_request_id: bool = True  # False behind Ray Serve, whose proxy adds the header x-request-id


async def _tenant_name(request: Request) -> str:
    admission: Admission = request.scope["admission"]
    return admission.tenant.name


TenantName = Annotated[str, Depends(_tenant_name)]
"""The name of the tenant that sends a request."""


class _JsonRequest(Request):
    """A request whose body is read as JSON in the strict sense, and only to a limited depth."""

    async def json(self) -> Any:
        body = await self.body()
        if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
            raise HTTPException(
                400, f"the body is nested too deeply, or has more than {MAX_CONTAINERS} lists and objects"
            )
        try:
            value = json.loads(body, parse_constant=_reject_constant)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise HTTPException(400, f"the body is not JSON that can be read: {reason}") from None
        if _is_deeper_than(value, MAX_NESTING):
            raise HTTPException(400, f"the body is nested too deeply: {MAX_NESTING} levels are the most")
        return value


class JsonRoute(APIRoute):
    """A route whose request has a JSON body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the function that handles a request."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":  # web pages of other sites cannot send this type unasked
                raise HTTPException(415, "the body must be JSON: send the header Content-Type: application/json")
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _is_deeper_than(value: Any, levels: int) -> bool:
    """Return True if lists and objects are nested in more than `levels` levels."""
    containers: list[Any] = [[value]]
    for _ in range(levels + 1):
        children = (child.values() if isinstance(child, dict) else child for child in containers)
        containers = [child for each in children for child in each if isinstance(child, CONTAINERS)]
    return bool(containers)


def generated(whole: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the description of a response that is `whole`, or a stream."""
    return {200: {"model": whole, "content": {"text/event-stream": {}}, "description": "The response, or a stream"}}


def check_model(name: str, card: ModelCard) -> None:
    """Raise `RequestError` (404) if a request is for another model."""
    if name != card.id:
        message = f"model {reprlib.repr(name)} is not served here: use {card.id!r}"
        raise RequestError(404, message, code="model_not_found", param="model")


def add_middleware(app: FastAPI, errors: ErrorResponder, tenants: Tenants, options: AppOptions) -> None:
    """Add all middleware. The last one added is the first one to see a request."""
    app.add_middleware(BodyLimit, options.max_body_bytes, options.max_body_seconds)
    app.add_middleware(Gate, errors, tenants, options.allowed_hosts)
    app.add_middleware(RequestIds, errors, options.add_request_id)


def add_error_handlers(app: FastAPI, errors: ErrorResponder) -> None:
    """Make the app respond to every error in OpenAI's format."""

    @app.exception_handler(ServingError)
    async def serving(request: Request, error: ServingError) -> JSONResponse:
        return errors.response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        field, reason = _first_wrong_field(error)
        return errors.response(RequestError(400, f"{field or 'body'}: {reason}", param=field or None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path[:MAX_SHOWN]
        response = errors.response(RequestError(error.status_code, f"{path}: {error.detail}"))
        response.headers.update(error.headers or {})
        return response


def _first_wrong_field(error: RequestValidationError) -> tuple[str, str]:
    """Return the path of the first field that is wrong, and the reason.

    A field of several types has one error for each type. That of the most specific place counts.
    """
    found = [(_path(each["loc"]), str(each["msg"]).removeprefix("Value error, ")) for each in error.errors()]
    first = found[0][0]
    path, reason = max((each for each in found if each[0][: len(first)] == first), key=lambda each: len(each[0]))
    return ".".join(path), reason


def _path(location: Sequence[str | int]) -> list[str]:
    """Return the names and indices of a place in a body, without the names of types that pydantic puts in between."""
    return [str(part) for part in location if part != "body" and not _TYPE_NAME.match(str(part))]
