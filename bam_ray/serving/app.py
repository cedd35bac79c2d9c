"""The OpenAI-compatible HTTP app on top of a scheduler: a FastAPI app for uvicorn or Ray Serve.

    POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics

Streams are server-sent events that end with `data: [DONE]`. When a client disconnects, its slots are freed.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from bam_ray.errors import ServingError
from bam_ray.serving.metrics import ServerMetrics
from bam_ray.serving.openai_types import (
    ChatRequest,
    CompletionRequest,
    ErrorResponse,
    ModelCard,
    ModelList,
    RequestError,
)
from bam_ray.serving.prompts import chat_prompt, completion_prompts
from bam_ray.serving.request_handler import RequestHandler
from bam_ray.serving.responses import ChatBuilder, CompletionBuilder
from bam_ray.serving.scheduler import Scheduler

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions; chat has no limit but the model's


def create_app(scheduler: Scheduler, model_name: str) -> FastAPI:
    """Return an app that serves the scheduler's model under the name `model_name`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await scheduler.close()

    app = FastAPI(title=f"{model_name} (bam-ray)", lifespan=lifespan)
    metrics = ServerMetrics(scheduler)
    card = ModelCard(id=model_name, created=int(time.time()), max_model_len=scheduler.engine.max_length)
    app.include_router(_generation_routes(RequestHandler(scheduler, metrics), card))
    app.include_router(_information_routes(metrics, card))
    _add_error_handlers(app, metrics)
    return app


def _generation_routes(handler: RequestHandler, card: ModelCard) -> APIRouter:
    """Return the routes that generate text."""
    router = APIRouter()
    engine = handler.engine

    @router.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check_model(body.model, card)
        prompts = completion_prompts(engine, body)
        params = body.sampling_params(body.max_tokens or DEFAULT_COMPLETION_TOKENS, body.logprobs)
        builder = CompletionBuilder(card.id)
        if body.stream:
            return handler.stream(prompts, params, builder, body.include_usage)
        return await handler.respond(prompts, params, builder, request)

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        _check_model(body.model, card)
        prompt, stops = chat_prompt(engine, body)
        max_tokens = body.max_completion_tokens or body.max_tokens or engine.max_length
        params = body.sampling_params(max_tokens, (body.top_logprobs or 0) if body.logprobs else None, stops)
        builder = ChatBuilder(card.id)
        if body.stream:
            return handler.stream([prompt], params, builder, body.include_usage)
        return await handler.respond([prompt], params, builder, request)

    return router


def _information_routes(metrics: ServerMetrics, card: ModelCard) -> APIRouter:
    """Return the routes that describe the model and the state of the server."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        _check_model(name, card)
        return card

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def _check_model(name: str, card: ModelCard) -> None:
    if name != card.id:
        message = f"model {name!r} is not served here: use {card.id!r}"
        raise RequestError(404, message, code="model_not_found", param="model")


def _add_error_handlers(app: FastAPI, metrics: ServerMetrics) -> None:
    """Make the app respond to every error in OpenAI's format."""

    def respond(error: ServingError, status: int) -> JSONResponse:
        return JSONResponse(ErrorResponse.from_error(error).model_dump(), status)

    @app.exception_handler(ServingError)
    async def serving(request: Request, error: ServingError) -> JSONResponse:
        if isinstance(error, RequestError):
            metrics.count_request("refused")
            return respond(error, error.status)
        return respond(error, 500)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        return await serving(request, RequestError(400, f"{field or 'body'}: {first['msg']}", param=field or None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return await serving(request, RequestError(error.status_code, f"{request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        metrics.count_request("failed")  # the traceback is in the server's log
        return respond(ServingError(f"internal error: {type(error).__name__}: see the log of the server"), 500)
