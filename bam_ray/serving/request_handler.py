"""The request handler: passes prompts to the scheduler and returns the response, streamed or whole."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from bam_ray.errors import Overloaded, ServingError
from bam_ray.serving.engine import Delta
from bam_ray.serving.lora import SlotAdapter
from bam_ray.serving.metrics import RequestOutcome, RequestTimer, ServerMetrics
from bam_ray.serving.openai_responses import Usage
from bam_ray.serving.openai_types import ErrorResponse, RequestError, UsageReport
from bam_ray.serving.responses import ResponseBuilder
from bam_ray.serving.sampling import SamplingParams
from bam_ray.serving.scheduler import Scheduler
from bam_ray.serving.served_adapters import AdapterUse, ServedAdapters
from bam_ray.serving.tenants import Admission

Result = TypeVar("Result")

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not buffer events
CLIENT_CLOSED_REQUEST = 499  # nginx's status code; no client receives it


@dataclass(frozen=True)
class GenerationJob:
    """One admitted request: the prompts to continue, and the builder of the response."""

    prompts: list[list[int]]
    params: SamplingParams
    builder: ResponseBuilder
    stream: bool
    usage_report: UsageReport
    adapter: AdapterUse | None = None  # of a server with adapters

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of all prompts."""
        return sum(map(len, self.prompts))

    def usage_of(self, index: int, generated: int, cached: int) -> Usage:
        """Return the usage of one completion that has `generated` tokens so far, and of its prompt."""
        return Usage.of(len(self.prompts[index // self.params.n]), generated, cached)

    def most_tokens(self, max_length: int) -> int:
        """Return the number of tokens that the request uses at most, prompts and completions together."""
        return self.params.n * sum(min(len(prompt) + self.params.max_tokens, max_length) for prompt in self.prompts)


class RequestHandler:
    """A handler that passes prompts to a scheduler and counts the outcome of each request."""

    def __init__(self, scheduler: Scheduler, metrics: ServerMetrics, adapters: ServedAdapters | None = None) -> None:
        self._scheduler, self._metrics, self._adapters = scheduler, metrics, adapters

    async def respond(self, job: GenerationJob, request: Request) -> Response:
        """Return the response: one JSON body, or a stream of server-sent events once its first event is known.

        When the client disconnects, the request leaves the scheduler at once, also while it is queued.

        Raises:
            RequestError: A token is not in the vocabulary, or the completions can never be decoded together.
            RateLimited: The API key has too few tokens left.
            Overloaded: The queue is full.
            AdapterUnavailable: The adapter cannot be loaded.
            ServingError: The model failed.
        """
        self._check(job)
        admission: Admission = request.scope["admission"]
        admission.reserve(job.most_tokens(self._scheduler.engine.max_length))
        try:
            if not job.stream:
                body = await while_connected(request.receive, self._whole(job, admission))
                headers = None if job.adapter is None else job.adapter.headers
                return Response(body.model_dump_json(), headers=headers, media_type="application/json")
            events = self._events(job, admission)
            try:
                first = await while_connected(request.receive, _next(events))
            except BaseException:
                await events.aclose()
                raise
            return _EventStream(first, events, {} if job.adapter is None else job.adapter.headers)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    def _check(self, job: GenerationJob) -> None:
        """Raise `RequestError` if the engine cannot compute a request."""
        engine, params = self._scheduler.engine, job.params
        for name, tokens in (
            ("logit_bias", [token for token, _ in params.logit_bias]),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if max(tokens, default=0) >= engine.vocab_size:
                message = f"{name} has token {max(tokens)}, which is not in [0, {engine.vocab_size}): omit it"
                raise RequestError(400, message, param=name)
        if params.routing and engine.routing_layout is None:
            raise RequestError(400, "this model has no experts: omit routing", param="routing")
        try:
            engine.check_size(max(map(len, job.prompts)), params)
        except ServingError as error:
            raise RequestError(400, str(error), param="n") from None

    async def _whole(self, job: GenerationJob, admission: Admission) -> BaseModel:
        outputs = [Delta()] * (len(job.prompts) * job.params.n)
        async with aclosing(self._deltas(job, admission)) as batches:
            async for batch in batches:
                for index, delta in batch:
                    outputs[index] = outputs[index] + delta
        generated, cached = sum(len(output.tokens) for output in outputs), sum(output.cached for output in outputs)
        return job.builder.response(outputs, Usage.of(job.prompt_tokens, generated, cached))

    async def _events(self, job: GenerationJob, admission: Admission) -> AsyncGenerator[str, None]:
        """Yield the events of a stream. An error ends it: it is raised before the first event, and an event later."""
        generated, cached = ([0] * (len(job.prompts) * job.params.n) for _ in range(2))
        started = False
        try:
            async with aclosing(self._deltas(job, admission)) as batches:
                async for batch in batches:
                    events = []
                    for index, delta in batch:
                        generated[index] += len(delta.tokens)
                        cached[index] += delta.cached
                        reports = job.usage_report == "all"
                        usage = job.usage_of(index, generated[index], cached[index]) if reports else None
                        events += [_event(chunk, usage) for chunk in job.builder.chunks(index, delta)]
                    if events:
                        started = True
                        yield "".join(events)
        except ServingError as error:
            if not started:
                raise
            yield _event(ErrorResponse.from_error(error))
            return
        if job.usage_report != "none":
            usage = Usage.of(job.prompt_tokens, sum(generated), sum(cached))
            yield _event(job.builder.usage_chunk(usage))
        yield "data: [DONE]\n\n"

    async def _deltas(self, job: GenerationJob, admission: Admission) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Yield the deltas of the scheduler, and count the outcome of the request and its tokens."""
        outcome: RequestOutcome | None = "left"
        tenant, timer = admission.tenant.name, RequestTimer(self._metrics)
        try:
            async with self._lease(job) as adapter:
                batches = self._scheduler.generate(
                    job.prompts, job.params, paced=job.stream, tenant=tenant, adapter=adapter
                )
                admission.used_tokens = job.prompt_tokens  # also if the client leaves before the first token
                async with aclosing(batches):
                    async for batch in batches:
                        admission.used_tokens += sum(len(delta.tokens) for _, delta in batch)
                        timer.add(batch)
                        yield batch
            timer.finish()
            outcome = "finished"
        except Overloaded:
            outcome, admission.used_tokens = None, 0  # the error handler counts what is refused
            raise
        except ServingError:
            outcome = "failed"
            raise
        finally:
            if outcome is not None:
                self._metrics.count_request(outcome)

    @asynccontextmanager
    async def _lease(self, job: GenerationJob) -> AsyncGenerator[SlotAdapter | None, None]:
        """Keep the adapter of a request on the device, and state it in the response."""
        if self._adapters is None or job.adapter is None:
            yield None
            return
        async with self._adapters.lease(job.adapter, self._scheduler.when_left) as adapter:
            self._metrics.count_adapter(job.adapter)
            job.builder.adapter, job.builder.model = job.adapter, self._adapters.model_of(job.adapter.adapter)
            yield adapter


class _EventStream(StreamingResponse):
    """A stream of events that is closed as soon as the client disconnects, also if no event is being sent."""

    media_type = "text/event-stream"

    def __init__(self, first: str, rest: AsyncGenerator[str, None], headers: dict[str, str]) -> None:
        super().__init__(_chain(first, rest), headers=STREAM_HEADERS | headers)
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            with contextlib.suppress(ClientDisconnect, OSError):  # OSError: sending to a client that has left
                await while_connected(receive, self.stream_response(send))


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`. If the client disconnects first, cancel it and raise `ClientDisconnect`."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected. The body of the request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next(events: AsyncGenerator[str, None]) -> str:
    return await anext(events)


async def _chain(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    yield first
    async for event in rest:
        yield event


def _event(body: BaseModel, usage: Usage | None = None) -> str:
    if usage is not None:
        body = body.model_copy(update={"usage": usage})
    return f"data: {body.model_dump_json()}\n\n"
