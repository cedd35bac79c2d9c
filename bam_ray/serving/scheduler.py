"""The scheduler: drives the decode engine from asyncio, and streams the output of each request to its reader.

Requests wait in a queue for a free slot, and join and leave between steps. One task owns the engine. The model runs on
its own thread, so the event loop stays free to send output. At most one prompt is computed between two steps, so an
active request never waits for more than one prompt. When a reader closes its generator, its slots are freed before the
next step.
"""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bam_ray.errors import Overloaded, ServingError
from bam_ray.serving.engine import DecodeEngine, Delta, Generation
from bam_ray.serving.sampling import SamplingParams

_logger = logging.getLogger(__name__)

CHUNKS_PER_SECOND = 100
"""The number of chunks that all paced readers together receive per second. Each chunk costs the HTTP path milliseconds
(about 5 through Ray Serve), so under load one chunk carries several tokens."""


@dataclass(eq=False)
class _QueuedPrompt:
    """One prompt of a request, and the queue that receives its output."""

    index: int
    prompt: list[int]
    params: SamplingParams
    output: "asyncio.Queue[tuple[int, Delta | ServingError]]"
    generation: Generation | None = None  # set when the prompt has a slot


@dataclass
class SchedulerTotals:
    """Counters since the start of the server."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0


class Scheduler:
    """A scheduler that shares one `DecodeEngine` among concurrent readers; all calls must come from one event loop.

    Attributes:
        failure: The reason why the engine cannot serve any request; None while it can.
    """

    def __init__(
        self, engine: DecodeEngine, *, max_queued_prompts: int = 1024, max_queued_tokens: int = 1_000_000
    ) -> None:
        self.engine = engine
        self.failure: ServingError | None = None
        self._max_queued_prompts = max_queued_prompts
        self._max_queued_tokens = max_queued_tokens
        self.totals = SchedulerTotals()
        self._waiting: deque[_QueuedPrompt] = deque()
        self._running: dict[Generation, _QueuedPrompt] = {}
        self._abandoned: list[_QueuedPrompt] = []  # their readers have disconnected
        self._readers = 0
        self._work_available = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    @property
    def active(self) -> int:
        """The number of prompts being decoded."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """The number of prompts that wait for a slot."""
        return len(self._waiting)

    async def generate(
        self, prompts: list[list[int]], params: SamplingParams, paced: bool = False, tenant: str = ""
    ) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Continue each prompt, and yield the new output as (index of the prompt, delta) pairs.

        Closing the generator frees the slots.

        Args:
            prompts: The token ids of each prompt.
            params: The sampling parameters of all prompts.
            paced: Wait between yields if there are many readers, so that each yield carries more output.
            tenant: The name of the client.

        Raises:
            Overloaded: The queue is full.
            ServingError: The model failed, or the server is shutting down.
        """
        if self.failure is not None:
            raise self.failure
        queued_tokens = sum(len(queued.prompt) for queued in self._waiting) + sum(map(len, prompts))
        if len(self._waiting) + len(prompts) > self._max_queued_prompts or queued_tokens > self._max_queued_tokens:
            raise Overloaded("the queue of the server is full: retry later", 1.0)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        output: asyncio.Queue[tuple[int, Delta | ServingError]] = asyncio.Queue()
        unfinished = {i: _QueuedPrompt(i, prompt, params, output) for i, prompt in enumerate(prompts)}
        self._waiting.extend(unfinished.values())
        self._work_available.set()
        self._readers += 1
        next_time = 0.0
        try:
            while unfinished:
                first = await output.get()
                if paced and (pause := next_time - time.monotonic()) > 0:
                    await asyncio.sleep(pause)
                merged: dict[int, Delta] = {}
                for index, item in itertools.chain([first], _drain(output)):
                    if isinstance(item, ServingError):
                        raise item
                    merged[index] = merged[index] + item if index in merged else item
                    if item.finish_reason is not None:
                        del unfinished[index]
                next_time = time.monotonic() + self._readers / CHUNKS_PER_SECOND
                yield list(merged.items())
        finally:
            self._readers -= 1
            self._abandoned.extend(unfinished.values())
            self._work_available.set()

    async def close(self) -> None:
        """Stop the engine. Readers that are still open receive a `ServingError`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()
        _fail([*self._running.values(), *self._waiting], ServingError("the server is shutting down: retry later"))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._remove_abandoned()
            if not self._waiting and not self._running:
                self._work_available.clear()
                await self._work_available.wait()
                continue
            joining = self._waiting.popleft() if self._waiting and self.engine.free else None
            try:
                deltas = await loop.run_in_executor(self._thread, self._step, joining)
            except Exception as error:  # a model can raise anything: every reader gets the error, and serving continues
                self._handle_failure(joining, error)
                continue
            for queued, delta in deltas:
                queued.output.put_nowait((queued.index, delta))
                self.totals.completion_tokens += len(delta.tokens)
                if delta.finish_reason is not None and queued.generation is not None:
                    self._running.pop(queued.generation, None)

    def _step(self, joining: _QueuedPrompt | None) -> list[tuple[_QueuedPrompt, Delta]]:
        """Compute at most one prompt and then one step. Runs on the engine's thread."""
        start = time.perf_counter()
        deltas = []
        if joining is not None:
            generation, delta = self.engine.add(joining.prompt, joining.params)
            joining.generation = generation
            self._running[generation] = joining
            deltas.append((joining, delta))
            self.totals.prompt_tokens += len(joining.prompt)
        deltas += [(self._running[generation], delta) for generation, delta in self.engine.step()]
        self.totals.steps += 1
        self.totals.step_seconds += time.perf_counter() - start
        return deltas

    def _remove_abandoned(self) -> None:
        """Drop the prompts whose readers have disconnected."""
        for queued in self._abandoned:
            if queued.generation is not None:
                self.engine.remove(queued.generation)
                self._running.pop(queued.generation, None)
            elif queued in self._waiting:
                self._waiting.remove(queued)
        self._abandoned.clear()

    def _handle_failure(self, joining: _QueuedPrompt | None, error: Exception) -> None:
        """Send an error of the model to the readers that it concerns.

        An error in the computation of a prompt, for which memory may be short, concerns that prompt alone. Any other
        error concerns all active prompts, and clears the engine.
        """
        if joining is not None and joining.generation is None:
            lost = [joining]
        else:
            lost = [*self._running.values()]
            self.engine.clear()
            self._running.clear()
        _logger.error("the model failed", exc_info=error)  # its message may contain paths, which are not for clients
        memory = "out of memory" in str(error).lower()
        reason = "out of memory: send a shorter prompt, or retry later" if memory else "see the log of the server"
        _fail(lost, ServingError(f"the model failed: {reason}"))


def _fail(prompts: list[_QueuedPrompt], error: ServingError) -> None:
    for queued in prompts:
        queued.output.put_nowait((queued.index, error))


def _drain(queue: "asyncio.Queue[tuple[int, Delta | ServingError]]") -> "list[tuple[int, Delta | ServingError]]":
    """Return the current items of a queue without waiting."""
    return [queue.get_nowait() for _ in range(queue.qsize())]
