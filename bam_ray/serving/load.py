"""A load generator for any endpoint with OpenAI's `POST /v1/completions`: throughput and latencies under load.

Requests arrive independently of one another (a Poisson process), or all at once. Each is a stream with a random prompt
of its own, so that no cache of prompts helps.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from bam_ray.errors import ServingError

TIMEOUT = httpx.Timeout(600.0, connect=10.0)
WORDS = ("the", "law", "of", "a", "state", "is", "not", "one", "that", "was", "made", "for", "some", "people", "and")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class LoadOptions:
    """The requests that are sent."""

    url: str  # of the endpoint, such as http://127.0.0.1:8000/v1
    requests: int = 64
    rate: float | None = None  # mean number of requests that arrive per second; None: all arrive at once
    concurrency: int = 256  # requests beyond this number wait in the client
    prompt_words: int = 64
    max_tokens: int = 64
    model: str | None = None  # None: the first one that the endpoint lists
    api_key: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of each request
    seed: int = 0


@dataclass
class RequestTimes:
    """The times of one request, in seconds.

    `gaps` has one time for each token after the first: those between the chunks of the stream, where a chunk with n
    tokens counts as n equal ones.
    """

    first: float = 0.0  # until the first token, from the arrival
    total: float = 0.0  # until the last one
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class LoadReport:
    """The result of a load: the times of all requests and the duration of the whole, in seconds."""

    times: list[RequestTimes]
    seconds: float

    @property
    def finished(self) -> list[RequestTimes]:
        """The requests without an error."""
        return [each for each in self.times if each.error is None]

    @property
    def errors(self) -> list[str]:
        """The errors of the other requests."""
        return [each.error for each in self.times if each.error is not None]

    @property
    def tokens_per_second(self) -> float:
        """The number of tokens that were generated, per second."""
        return sum(each.tokens for each in self.finished) / self.seconds


def percentile(values: list[float], percent: int) -> float:
    """Return the value that `percent` % of the values do not exceed, or NaN without values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


async def run_load(options: LoadOptions) -> LoadReport:
    """Send all requests and wait for their responses. Errors of single requests are in the report.

    Raises:
        ServingError: The endpoint does not answer, or has no model.
    """
    rng = random.Random(options.seed)
    headers = {} if options.api_key is None else {"authorization": f"Bearer {options.api_key}"}
    limits = httpx.Limits(max_connections=options.concurrency, max_keepalive_connections=options.concurrency)
    base = options.url.rstrip("/")
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=TIMEOUT) as client:
        model = options.model or await _first_model(client, base)
        slots = asyncio.Semaphore(options.concurrency)
        start = time.perf_counter()
        tasks = []
        for _ in range(options.requests):
            body = {
                "model": model,
                "prompt": " ".join(rng.choices(WORDS, k=options.prompt_words)),
                "max_tokens": options.max_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                **options.extra,
            }
            tasks.append(asyncio.create_task(_send(client, f"{base}/completions", body, slots)))
            if options.rate is not None:
                await asyncio.sleep(rng.expovariate(options.rate))
        times = await asyncio.gather(*tasks)
        return LoadReport(times, time.perf_counter() - start)


async def _first_model(client: httpx.AsyncClient, base: str) -> str:
    """Return the first model that an endpoint lists."""
    try:
        response = await client.get(f"{base}/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPError as error:
        raise ServingError(f"{base}/models does not answer ({error}): pass the URL of an endpoint, with /v1") from None
    except (ValueError, LookupError, TypeError):
        raise ServingError(f"{base}/models lists no model: pass --model") from None


async def _send(client: httpx.AsyncClient, url: str, body: dict[str, Any], slots: asyncio.Semaphore) -> RequestTimes:
    """Send one request and measure its stream."""
    times = RequestTimes()
    arrived = time.perf_counter()
    try:
        async with slots, client.stream("POST", url, json=body) as response:
            if response.is_error:
                times.error = f"status {response.status_code}: {(await response.aread()).decode(errors='replace')}"
                return times
            await _read(response, arrived, times)
    except httpx.HTTPError as error:
        times.error = f"{type(error).__name__}: {error}"
    return times


async def _read(response: httpx.Response, arrived: float, times: RequestTimes) -> None:
    """Measure a stream of server-sent events."""
    chunks: list[float] = []  # the times of the chunks with text
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            times.error = str(event["error"])
            return
        if any(choice.get("text") for choice in event.get("choices") or ()):
            chunks.append(time.perf_counter() - arrived)
        if event.get("usage"):
            times.tokens = event["usage"]["completion_tokens"]
    if not chunks:  # its times are not known
        times.error = "the stream has no text"
        return
    times.tokens = times.tokens or len(chunks)
    times.first, times.total = chunks[0], chunks[-1]
    each = max(1, times.tokens // len(chunks))
    times.gaps = [(after - before) / each for before, after in pairwise(chunks) for _ in range(each)]
