"""The HTTP app in front of vLLM's server: the same keys, limits, checks and errors as before the project's own engine.

    POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics
    POST /tokenize         POST /detokenize

Requests are checked and passed to vLLM as they are. Its responses and streams are passed back as they are, and its
errors are converted to OpenAI's format. When a client disconnects, vLLM aborts its request.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, Callable

import httpx
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from bam_ray.errors import Overloaded, ServingError
from bam_ray.serving.app_parts import (
    ERRORS,
    AppOptions,
    JsonRoute,
    add_error_handlers,
    add_middleware,
    check_model,
    generated,
)
from bam_ray.serving.error_responses import ErrorResponder
from bam_ray.serving.metrics import RequestCounter, RequestOutcome
from bam_ray.serving.openai_responses import ChatCompletion, Completion, Detokenized, ModelCard, ModelList, Tokenized
from bam_ray.serving.openai_types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorResponse,
    GenerationRequest,
    RequestError,
    TokenizeRequest,
)
from bam_ray.serving.prompts import check_prompts
from bam_ray.serving.request_handler import CLIENT_CLOSED_REQUEST, STREAM_HEADERS, while_connected
from bam_ray.serving.tenants import Tenants
from bam_ray.serving.vllm_server import BASE_URL, VllmServer

OWN_FIELDS = ("domain", "routing")  # of the project's own engine
BUSY_RETRY_SECONDS = 1.0  # after which a client should try again if too many requests wait


def create_vllm_app(
    server: VllmServer, model_name: str, max_length: int, max_requests: int, options: AppOptions | None = None
) -> FastAPI:
    """Return an app that serves vLLM's model, and stops vLLM when it ends. Its `state.metrics` has the metrics.

    Args:
        server: vLLM's server, which nothing else may use.
        model_name: The name of the model in requests.
        max_length: The maximum length of prompt and completion together, in tokens.
        max_requests: The number of requests that may be computed or wait. More are refused with status 429.
        options: The limits of requests, and who may send them.

    Raises:
        ServingError: A key has a limit of tokens, which are counted by the project's own engine only.
    """
    options = options or AppOptions()
    limited = next((key.name for key in options.api_keys if key.tokens_per_minute), None)
    if limited is not None:
        raise ServingError(f"key {limited} has tokens_per_minute, which serve.engine vllm cannot count: remove it")
    metrics = RequestCounter()
    errors = ErrorResponder(metrics)
    gateway = _Gateway(server, metrics, max_requests)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await gateway.close()
        server.close()

    app = FastAPI(title=f"{model_name} (bam-ray, vLLM)", lifespan=lifespan, responses=ERRORS)
    app.state.metrics = metrics
    card = ModelCard(
        id=model_name,
        root=model_name,
        created=int(time.time()),
        max_model_len=max_length,
        artifacts=options.artifacts,
    )
    app.include_router(_forwarded_routes(gateway, card, options.max_prompts))
    app.include_router(_information_routes(gateway, server, errors, card))
    add_error_handlers(app, errors)
    add_middleware(app, errors, Tenants(options.api_keys), options)
    return app


class _Gateway:
    """A client of vLLM's server that passes requests on."""

    def __init__(self, server: VllmServer, metrics: RequestCounter, max_requests: int) -> None:
        self._server, self._metrics, self._max_requests = server, metrics, max_requests
        self._active = 0
        limits = httpx.Limits(max_connections=None)
        transport = httpx.AsyncHTTPTransport(uds=str(server.socket), limits=limits)
        self._client = httpx.AsyncClient(base_url=BASE_URL, transport=transport, timeout=None)

    async def forward(self, request: Request) -> Response:
        """Return vLLM's response to a request whose body has been read.

        Raises:
            RequestError: vLLM refuses the request.
            Overloaded: Too many requests are computed or wait.
            ServingError: vLLM fails, or has ended.
        """
        if self._active >= self._max_requests:
            raise Overloaded(f"{self._active} requests are computed or wait: retry later", BUSY_RETRY_SECONDS)
        self._active += 1
        try:
            response = await while_connected(request.receive, self._send(request))
        except ClientDisconnect:
            self._end("left")
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except BaseException as error:
            self._active -= 1  # the error handler counts what is refused
            if not isinstance(error, RequestError):
                self._metrics.count_request("failed")
            raise
        if isinstance(response, httpx.Response):
            return _VllmStream(response, self._end)
        self._end("finished")
        return response

    async def _send(self, request: Request) -> "Response | httpx.Response":
        """Return vLLM's whole response, or the open response of a stream."""
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        sent = self._client.build_request("POST", request.url.path, content=await request.body(), headers=headers)
        try:
            response = await self._client.send(sent, stream=True)
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                return response
            content = await response.aread()
        except httpx.HTTPError as error:
            raise self._server.failure or ServingError(f"vLLM does not answer: {error}") from None
        if response.status_code >= 400:
            raise _error_of(response)
        return Response(content, media_type="application/json")

    def _end(self, outcome: RequestOutcome) -> None:
        self._active -= 1
        self._metrics.count_request(outcome)

    async def metrics(self) -> bytes:
        """Return the metrics of vLLM and of this app in Prometheus' text format."""
        try:
            own = (await self._client.get("/metrics")).content
        except httpx.HTTPError:  # it has ended
            own = b""
        return own + self._metrics.text()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


class _VllmStream(StreamingResponse):
    """A stream of vLLM, which is closed as soon as the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, response: httpx.Response, end: Callable[[RequestOutcome], None]) -> None:
        super().__init__(self._events(), headers=STREAM_HEADERS)
        self._response, self._end = response, end
        self._outcome: RequestOutcome = "left"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect, OSError):  # OSError: sending to a client that has left
                await while_connected(receive, self.stream_response(send))
        finally:
            await self._response.aclose()
            self._end(self._outcome)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self._response.aiter_raw():
                yield chunk
            self._outcome = "finished"
        except httpx.HTTPError:
            self._outcome = "failed"
            error = ErrorResponse.from_error(ServingError("vLLM has ended: see the log of the server"))
            yield f"data: {error.model_dump_json()}\n\n".encode()


def _error_of(response: httpx.Response) -> ServingError:
    """Return vLLM's error as one of this project."""
    if response.status_code >= 500:
        return ServingError("the model failed: see the log of the server")
    try:
        error = response.json()["error"]
        message, param = " ".join(str(error["message"]).split()), error.get("param")
    except (ValueError, KeyError, TypeError):
        message, param = "vLLM refuses the request", None
    code = "context_length_exceeded" if "context length" in message else None
    return RequestError(response.status_code, message, code, param if isinstance(param, str) else None)


def _forwarded_routes(gateway: _Gateway, card: ModelCard, max_prompts: int) -> APIRouter:
    """Return the routes whose requests are checked and passed to vLLM."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", response_model=None, responses=generated(Completion))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model, card)
        check_prompts(body, max_prompts)
        _check_fields(body)
        return await gateway.forward(request)

    @router.post("/v1/chat/completions", response_model=None, responses=generated(ChatCompletion))
    async def chat(body: ChatRequest, request: Request) -> Response:
        check_model(body.model, card)
        _check_fields(body)
        return await gateway.forward(request)

    @router.post("/tokenize", response_model=None, responses={200: {"model": Tokenized}})
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        check_model(body.model or card.id, card)
        return await gateway.forward(request)

    @router.post("/detokenize", response_model=None, responses={200: {"model": Detokenized}})
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        check_model(body.model or card.id, card)
        return await gateway.forward(request)

    return router


def _check_fields(body: GenerationRequest) -> None:
    """Raise `RequestError` for a field that only the project's own engine has."""
    for name in OWN_FIELDS:
        if getattr(body, name):
            raise RequestError(400, f"{name} needs serve.engine bam: omit it", "unsupported_value", name)


def _information_routes(gateway: _Gateway, server: VllmServer, errors: ErrorResponder, card: ModelCard) -> APIRouter:
    """Return the routes that describe the model and the state of the server."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        check_model(name, card)
        return card

    @router.get("/health")
    async def health() -> Response:
        failure = server.failure
        return JSONResponse({"status": "ok"}) if failure is None else errors.response(failure, 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(await gateway.metrics(), media_type=CONTENT_TYPE_LATEST)

    return router
