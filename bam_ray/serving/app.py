"""The OpenAI-compatible HTTP app on top of a scheduler: a FastAPI app for uvicorn or Ray Serve.

    POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics   GET /
    POST /tokenize         POST /detokenize            GET /tokenizer_info   GET /v1/adapters

Streams are server-sent events that end with `data: [DONE]`. When a client disconnects, its slots are freed.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from bam_ray.serving.app_parts import (
    ERRORS,
    AppOptions,
    JsonRoute,
    TenantName,
    add_error_handlers,
    add_middleware,
    generated,
)
from bam_ray.serving.error_responses import ErrorResponder
from bam_ray.serving.metrics import ServerMetrics
from bam_ray.serving.models import ServedModels, model_routes
from bam_ray.serving.openai_responses import (
    ChatCompletion,
    Completion,
    Detokenized,
    ModelCard,
    Tokenized,
    TokenizerDescription,
)
from bam_ray.serving.openai_types import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from bam_ray.serving.prompts import PromptReader
from bam_ray.serving.request_handler import GenerationJob, RequestHandler
from bam_ray.serving.responses import ChatBuilder, CompletionBuilder
from bam_ray.serving.scheduler import Scheduler
from bam_ray.serving.served_adapters import ServedAdapters
from bam_ray.serving.tenants import Tenants

PAGE = (files("bam_ray.serving") / "page" / "index.html").read_text(encoding="utf-8")
PAGE_HEADERS = {
    # The page has its own script and style, talks to this server only, and is not shown inside other pages
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions; chat has no limit but the model's


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

    app = FastAPI(title=f"{model_name} (bam-ray)", lifespan=lifespan, responses=ERRORS)
    app.state.metrics = metrics = ServerMetrics(scheduler, model_name, adapters.pool if adapters else None)
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
    app.include_router(_information_routes(scheduler, metrics, errors, card))
    app.include_router(model_routes(models))
    add_error_handlers(app, errors)
    add_middleware(app, errors, Tenants(options.api_keys), options)
    return app


def _generation_routes(handler: RequestHandler, prompts: PromptReader, models: ServedModels) -> APIRouter:
    """Return the routes that generate text."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", response_model=None, responses=generated(Completion))
    async def completions(body: CompletionRequest, request: Request, tenant: TenantName) -> Response:
        await models.check(body.model)
        tokens = await prompts.completion_prompts(body, tenant)
        text = await prompts.first_text(body, tokens, tenant) if models.chooses(body.model) else ""
        use = await models.choose(body.model, text)
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        params = await prompts.complete(body.sampling_params(max_tokens, body.logprobs), body.domain, tenant)
        builder = CompletionBuilder(models.base.id, await prompts.echoes(body, tokens, tenant))
        job = GenerationJob(tokens, params, builder, bool(body.stream), body.usage_report, use)
        return await handler.respond(job, request)

    @router.post("/v1/chat/completions", response_model=None, responses=generated(ChatCompletion))
    async def chat(body: ChatRequest, request: Request, tenant: TenantName) -> Response:
        await models.check(body.model)
        prompt, stops = await prompts.chat_prompt(body, tenant)
        use = await models.choose(body.model, body.last_text)
        max_tokens = body.max_completion_tokens or body.max_tokens or models.base.max_model_len
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = await prompts.complete(body.sampling_params(max_tokens, logprobs, stops), body.domain, tenant)
        builder = ChatBuilder(models.base.id)
        job = GenerationJob([prompt], params, builder, bool(body.stream), body.usage_report, use)
        return await handler.respond(job, request)

    return router


def _tokenizer_routes(tokenizer: Any, prompts: PromptReader, models: ServedModels) -> APIRouter:
    """Return the routes that convert text to tokens and back, with vLLM's paths and fields."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, tenant: TenantName) -> Tokenized:
        await models.check(body.model or models.base.id)
        tokens = await prompts.tokens(body, tenant)
        names = tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        return Tokenized(count=len(tokens), max_model_len=models.base.max_model_len, tokens=tokens, token_strs=names)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, tenant: TenantName) -> Detokenized:
        await models.check(body.model or models.base.id)
        return Detokenized(prompt=await prompts.text(body, tenant))

    return router


def _information_routes(
    scheduler: Scheduler, metrics: ServerMetrics, errors: ErrorResponder, card: ModelCard
) -> APIRouter:
    """Return the routes that describe the model and the state of the server."""
    router = APIRouter()
    tokenizer = scheduler.engine.tokenizer

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerDescription:
        return TokenizerDescription(
            tokenizer_class=type(tokenizer).__name__,
            model_max_length=card.max_model_len,
            chat_template=getattr(tokenizer, "chat_template", None),
            **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
        )

    @router.get("/health")
    async def health() -> Response:
        if scheduler.failure is not None:
            return errors.response(scheduler.failure, 503)
        return JSONResponse({"status": "ok"})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
