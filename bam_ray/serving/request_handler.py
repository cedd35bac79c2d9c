"""The request handler: passes prompts to the scheduler and returns the response, streamed or whole."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from bam_ray.errors import ServingError
from bam_ray.serving.engine import DecodeEngine, Delta
from bam_ray.serving.metrics import RequestOutcome, ServerMetrics
from bam_ray.serving.openai_types import ErrorResponse, Usage
from bam_ray.serving.responses import ResponseBuilder
from bam_ray.serving.sampling import SamplingParams
from bam_ray.serving.scheduler import Scheduler

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not buffer events
CLIENT_CLOSED_REQUEST = 499  # nginx's status code; no client receives it


class RequestHandler:
    """A handler that passes prompts to a scheduler and counts the outcome of each request."""

    def __init__(self, scheduler: Scheduler, metrics: ServerMetrics) -> None:
        self._scheduler = scheduler
        self._metrics = metrics

    @property
    def engine(self) -> DecodeEngine:
        """The decode engine of the scheduler."""
        return self._scheduler.engine

    def stream(
        self, prompts: list[list[int]], params: SamplingParams, builder: ResponseBuilder, include_usage: bool
    ) -> StreamingResponse:
        """Return the response as a stream of server-sent events."""
        events = self._events(prompts, params, builder, include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)

    async def respond(
        self, prompts: list[list[int]], params: SamplingParams, builder: ResponseBuilder, request: Request
    ) -> Response:
        """Return the response as one JSON body. Raises `ServingError` if the model fails."""
        outputs = [Delta()] * len(prompts)
        async with aclosing(self._deltas(prompts, params, paced=False)) as batches:
            async for batch in batches:
                for index, delta in batch:
                    outputs[index] = outputs[index] + delta
                if await request.is_disconnected():
                    return Response(status_code=CLIENT_CLOSED_REQUEST)
        response = builder.response(outputs, _usage(prompts, sum(len(output.tokens) for output in outputs)))
        return Response(response.model_dump_json(), media_type="application/json")

    async def _events(
        self, prompts: list[list[int]], params: SamplingParams, builder: ResponseBuilder, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        generated = 0
        try:
            async with aclosing(self._deltas(prompts, params, paced=True)) as batches:
                async for batch in batches:
                    generated += sum(len(delta.tokens) for _, delta in batch)
                    # A delta has no text if a character is incomplete or a stop string may have started
                    visible = [pair for pair in batch if pair[1] != Delta(tokens=pair[1].tokens)]
                    if visible:
                        yield "".join(_event(builder.chunk(index, delta)) for index, delta in visible)
            if include_usage:
                yield _event(builder.usage_chunk(_usage(prompts, generated)))
        except ServingError as error:  # the HTTP status has been sent: the error becomes an event
            yield _event(ErrorResponse.from_error(error))
        yield "data: [DONE]\n\n"

    async def _deltas(
        self, prompts: list[list[int]], params: SamplingParams, paced: bool
    ) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Yield the deltas of the scheduler, and count the outcome of the request."""
        outcome: RequestOutcome = "left"
        try:
            async with aclosing(self._scheduler.generate(prompts, params, paced)) as batches:
                async for batch in batches:
                    yield batch
            outcome = "finished"
        except ServingError:
            outcome = "failed"
            raise
        finally:
            self._metrics.count_request(outcome)


def _usage(prompts: list[list[int]], generated: int) -> Usage:
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=generated, total_tokens=prompt_tokens + generated)


def _event(body: BaseModel) -> str:
    return f"data: {body.model_dump_json()}\n\n"
