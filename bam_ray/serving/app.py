"""The OpenAI-compatible HTTP app on top of a scheduler: a FastAPI app for uvicorn or Ray Serve.

    POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics   GET /
    POST /tokenize         POST /detokenize            GET /v1/adapters

Streams are server-sent events that end with `data: [DONE]`. When a client disconnects, its slots are freed.
"""

import json
import time
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NoReturn

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from bam_ray.errors import ServingError
from bam_ray.serving.error_responses import ErrorResponder
from bam_ray.serving.metrics import ServerMetrics
from bam_ray.serving.middleware import BodyLimit, Gate, RequestIds
from bam_ray.serving.models import ServedModels, model_routes
from bam_ray.serving.openai_responses import Detokenized, ModelCard, Tokenized
from bam_ray.serving.openai_types import (
    MAX_SHOWN,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestError,
    TokenizeRequest,
)
from bam_ray.serving.prompts import PromptReader
from bam_ray.serving.request_handler import GenerationJob, RequestHandler
from bam_ray.serving.responses import ChatBuilder, CompletionBuilder
from bam_ray.serving.scheduler import Scheduler
from bam_ray.serving.served_adapters import ServedAdapters
from bam_ray.serving.tenants import Tenants
from bam_ray.settings.api_keys import ApiKey

PAGE = (files("bam_ray.serving") / "page" / "index.html").read_text(encoding="utf-8")
PAGE_HEADERS = {
    # The page has its own script and style, talks to this server only, and is not shown inside other pages
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions; chat has no limit but the model's
MAX_NESTING = 64  # of lists and objects in a request
CONTAINERS = (dict, list)
MAX_CONTAINERS = 100_000  # lists and objects in a request; the garbage collector makes millions of them slow to read


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


def create_app(
    scheduler: Scheduler,
    model_name: str,
    options: AppOptions | None = None,
    adapters: ServedAdapters | None = None,
) -> FastAPI:
    """Return an app that serves the scheduler's model under the name `model_name`, and its adapters, if there are.

    Its `state.metrics` has the metrics.
    """
    options = options or AppOptions()
    prompts = PromptReader(scheduler.engine, options.max_prompts, options.max_prompt_tokens)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        prompts.close()
        await scheduler.close()
        if adapters is not None:
            await adapters.pool.close()

    app = FastAPI(title=f"{model_name} (bam-ray)", lifespan=lifespan)
    app.state.metrics = metrics = ServerMetrics(scheduler, model_name)
    errors = ErrorResponder(metrics)
    created, length = int(time.time()), scheduler.engine.max_length
    layout = scheduler.engine.routing_layout
    card = ModelCard(
        id=model_name,
        root=model_name,
        created=created,
        max_model_len=length,
        routing=layout,
        artifacts=options.artifacts,
    )
    models = ServedModels(card, adapters)
    app.include_router(_generation_routes(RequestHandler(scheduler, metrics, adapters), prompts, models))
    app.include_router(_tokenizer_routes(scheduler.engine.tokenizer, prompts, models))
    app.include_router(_information_routes(scheduler, metrics, errors))
    app.include_router(model_routes(models))
    _add_error_handlers(app, errors)
    # The last one added is the first one to see a request
    app.add_middleware(BodyLimit, options.max_body_bytes, options.max_body_seconds)
    app.add_middleware(Gate, errors, Tenants(options.api_keys), options.allowed_hosts)
    app.add_middleware(RequestIds, errors, options.add_request_id)
    return app


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


class _JsonRoute(APIRoute):
    """A route whose request has a JSON body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
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


def _generation_routes(handler: RequestHandler, prompts: PromptReader, models: ServedModels) -> APIRouter:
    """Return the routes that generate text."""
    router = APIRouter(route_class=_JsonRoute)

    @router.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        await models.check(body.model)
        tokens = await prompts.completion_prompts(body)
        text = await prompts.first_text(body, tokens) if models.chooses(body.model) else ""
        use = await models.choose(body.model, text)
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        params = await prompts.complete(body.sampling_params(max_tokens, body.logprobs), body.domain)
        builder = CompletionBuilder(models.base.id, await prompts.echoes(body, tokens))
        job = GenerationJob(tokens, params, builder, bool(body.stream), body.include_usage, use)
        return await handler.respond(job, request)

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        await models.check(body.model)
        prompt, stops = await prompts.chat_prompt(body)
        use = await models.choose(body.model, body.last_text)
        max_tokens = body.max_completion_tokens or body.max_tokens or models.base.max_model_len
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = await prompts.complete(body.sampling_params(max_tokens, logprobs, stops), body.domain)
        builder = ChatBuilder(models.base.id)
        job = GenerationJob([prompt], params, builder, bool(body.stream), body.include_usage, use)
        return await handler.respond(job, request)

    return router


def _tokenizer_routes(tokenizer: Any, prompts: PromptReader, models: ServedModels) -> APIRouter:
    """Return the routes that convert text to tokens and back, with vLLM's paths and fields."""
    router = APIRouter(route_class=_JsonRoute)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        await models.check(body.model or models.base.id)
        tokens = await prompts.tokens(body)
        names = tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        return Tokenized(count=len(tokens), max_model_len=models.base.max_model_len, tokens=tokens, token_strs=names)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        await models.check(body.model or models.base.id)
        return Detokenized(prompt=await prompts.text(body))

    return router


def _information_routes(scheduler: Scheduler, metrics: ServerMetrics, errors: ErrorResponder) -> APIRouter:
    """Return the page and the routes that describe the state of the server."""
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    @router.get("/health")
    async def health() -> Response:
        if scheduler.failure is not None:
            return errors.response(scheduler.failure, 503)
        return JSONResponse({"status": "ok"})

    @router.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def _add_error_handlers(app: FastAPI, errors: ErrorResponder) -> None:
    """Make the app respond to every error in OpenAI's format."""

    @app.exception_handler(ServingError)
    async def serving(request: Request, error: ServingError) -> JSONResponse:
        return errors.response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        return errors.response(RequestError(400, f"{field or 'body'}: {first['msg']}", param=field or None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path[:MAX_SHOWN]
        response = errors.response(RequestError(error.status_code, f"{path}: {error.detail}"))
        response.headers.update(error.headers or {})
        return response
