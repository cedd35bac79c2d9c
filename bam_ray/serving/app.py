"""The OpenAI-compatible HTTP app over a scheduler: an ordinary FastAPI, for uvicorn or Ray Serve.

    POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics

Streams are server-sent events that end with `data: [DONE]`. A client that goes away frees its slots.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from bam_ray.errors import ServingError
from bam_ray.serving.answers import ChatWriter, CompletionWriter, Writer
from bam_ray.serving.engine import Delta
from bam_ray.serving.metrics import Metrics, Outcome
from bam_ray.serving.openai_types import (
    ChatRequest,
    CompletionRequest,
    ErrorResponse,
    Model,
    ModelList,
    RequestError,
    Usage,
)
from bam_ray.serving.prompts import chat_prompt, completion_prompts
from bam_ray.serving.sampling import Sampling
from bam_ray.serving.scheduler import Scheduler

COMPLETION_TOKENS = 16  # OpenAI's max_tokens of a completion that names none; a chat goes on to the model's limit
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not hold events back


def create_app(scheduler: Scheduler, model_name: str) -> FastAPI:
    """The app that serves the scheduler's model as `model_name`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await scheduler.close()

    app = FastAPI(title=f"{model_name} (bam-ray)", lifespan=lifespan)
    metrics = Metrics(scheduler)
    exchange = _Exchange(scheduler, metrics)
    card = Model(id=model_name, created=int(time.time()), max_model_len=scheduler.engine.max_length)
    _speak_openai_errors(app, metrics)

    def check_model(name: str) -> None:
        if name != model_name:
            message = f"model {name!r} is not served here: use {model_name!r}"
            raise RequestError(404, message, code="model_not_found", param="model")

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model)
        prompts = completion_prompts(scheduler.engine, body)
        sampling = body.sampling(body.max_tokens or COMPLETION_TOKENS, body.logprobs)
        writer = CompletionWriter(model_name)
        if body.stream:
            return exchange.stream(prompts, sampling, writer, body.include_usage)
        return await exchange.whole(prompts, sampling, writer, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        check_model(body.model)
        prompt, stops = chat_prompt(scheduler.engine, body)
        max_tokens = body.max_completion_tokens or body.max_tokens or scheduler.engine.max_length
        sampling = body.sampling(max_tokens, (body.top_logprobs or 0) if body.logprobs else None, stops)
        writer = ChatWriter(model_name)
        if body.stream:
            return exchange.stream([prompt], sampling, writer, body.include_usage)
        return await exchange.whole([prompt], sampling, writer, request)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Model:
        check_model(name)
        return card

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


class _Exchange:
    """Runs prompts through the scheduler and writes the answer, streamed or whole."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics) -> None:
        self._scheduler = scheduler
        self._metrics = metrics

    def stream(
        self, prompts: list[list[int]], sampling: Sampling, writer: Writer, include_usage: bool
    ) -> StreamingResponse:
        """Server-sent events."""
        events = self._events(prompts, sampling, writer, include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)

    async def whole(self, prompts: list[list[int]], sampling: Sampling, writer: Writer, request: Request) -> Response:
        """One JSON answer; raises `ServingError` where the model fails."""
        answers = [Delta()] * len(prompts)
        async with aclosing(self._deltas(prompts, sampling, paced=False)) as batches:
            async for batch in batches:
                for index, delta in batch:
                    answers[index] = answers[index] + delta
                if await request.is_disconnected():
                    return Response(status_code=499)  # nobody reads it: nginx's number for a client that left
        answer = writer.whole(answers, _usage(prompts, sum(len(answer.tokens) for answer in answers)))
        return Response(answer.model_dump_json(), media_type="application/json")

    async def _events(
        self, prompts: list[list[int]], sampling: Sampling, writer: Writer, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        written = 0
        try:
            async with aclosing(self._deltas(prompts, sampling, paced=True)) as batches:
                async for batch in batches:
                    written += sum(len(delta.tokens) for _, delta in batch)
                    # A delta may be empty: its characters are not whole yet, or may begin a stop string
                    visible = [pair for pair in batch if pair[1] != Delta(tokens=pair[1].tokens)]
                    if visible:
                        yield "".join(_event(writer.chunk(index, delta)) for index, delta in visible)
            if include_usage:
                yield _event(writer.usage_chunk(_usage(prompts, written)))
        except ServingError as error:  # the status went out long ago: the error is an event
            yield _event(ErrorResponse.of(error))
        yield "data: [DONE]\n\n"

    async def _deltas(
        self, prompts: list[list[int]], sampling: Sampling, paced: bool
    ) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """The scheduler's, with the outcome counted."""
        outcome: Outcome = "left"
        try:
            async with aclosing(self._scheduler.generate(prompts, sampling, paced)) as batches:
                async for batch in batches:
                    yield batch
            outcome = "finished"
        except ServingError:
            outcome = "failed"
            raise
        finally:
            self._metrics.count(outcome)


def _speak_openai_errors(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error in OpenAI's shape."""

    def answer(error: ServingError, status: int) -> JSONResponse:
        return JSONResponse(ErrorResponse.of(error).model_dump(), status)

    @app.exception_handler(ServingError)
    async def serving(request: Request, error: ServingError) -> JSONResponse:
        if isinstance(error, RequestError):
            metrics.count("refused")
            return answer(error, error.status)
        return answer(error, 500)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return await serving(request, RequestError(400, f"{place or 'body'}: {first['msg']}", param=place or None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return await serving(request, RequestError(error.status_code, f"{request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        metrics.count("failed")  # the traceback goes to the server's log
        return answer(ServingError(f"internal error: {type(error).__name__}"), 500)


def _usage(prompts: list[list[int]], written: int) -> Usage:
    read = sum(len(prompt) for prompt in prompts)
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def _event(body: BaseModel) -> str:
    return f"data: {body.model_dump_json()}\n\n"
