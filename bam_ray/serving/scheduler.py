"""Asyncio around the engine: requests wait in a queue, join and leave between steps, and read their text as it comes.

One task owns the engine. The model runs on a thread of its own, so the event loop stays free to send what is ready.
Between two steps at most one prompt is computed: a request in full flow never waits for more than that.
A reader that goes away (its generator is closed) frees its slot before the next step.
"""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bam_ray.errors import ServingError
from bam_ray.serving.engine import DecodeEngine, Delta, Generation
from bam_ray.serving.sampling import Sampling

CHUNKS_PER_SECOND = 100
"""Chunks sent in a second to all paced readers together. A chunk costs the HTTP path milliseconds (through Ray Serve
about 5), so under load several tokens travel in one."""


@dataclass(eq=False)
class _Request:
    """A prompt and where its text goes."""

    index: int
    prompt: list[int]
    sampling: Sampling
    out: "asyncio.Queue[tuple[int, Delta | ServingError]]"
    generation: Generation | None = None


@dataclass
class Totals:
    """Counts since the start."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0


class Scheduler:
    """Many concurrent readers over one `DecodeEngine`. Made anywhere, used on one event loop."""

    def __init__(self, engine: DecodeEngine) -> None:
        self.engine = engine
        self.totals = Totals()
        self._waiting: deque[_Request] = deque()
        self._running: dict[Generation, _Request] = {}
        self._left: list[_Request] = []  # their readers have gone
        self._readers = 0
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    @property
    def active(self) -> int:
        """Requests being decoded."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    async def generate(
        self, prompts: list[list[int]], sampling: Sampling, paced: bool = False
    ) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Continue each prompt; yields what came since the last time as (index of the prompt, delta) pairs.

        `paced` leaves time between yields when there are many readers, so that each yield holds more.
        Raises `ServingError` where the model fails. Closing the generator frees the slots.
        """
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        out: asyncio.Queue[tuple[int, Delta | ServingError]] = asyncio.Queue()
        open_requests = {i: _Request(i, prompt, sampling, out) for i, prompt in enumerate(prompts)}
        self._waiting.extend(open_requests.values())
        self._work.set()
        self._readers += 1
        next_time = 0.0
        try:
            while open_requests:
                first = await out.get()
                if paced and (pause := next_time - time.monotonic()) > 0:
                    await asyncio.sleep(pause)
                merged: dict[int, Delta] = {}
                for index, item in itertools.chain([first], _drained(out)):
                    if isinstance(item, ServingError):
                        raise item
                    merged[index] = merged[index] + item if index in merged else item
                    if item.finish_reason is not None:
                        del open_requests[index]
                next_time = time.monotonic() + self._readers / CHUNKS_PER_SECOND
                yield list(merged.items())
        finally:
            self._readers -= 1
            self._left.extend(open_requests.values())
            self._work.set()

    async def close(self) -> None:
        """Stop; readers still open get a `ServingError`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()
        self._fail([*self._running.values(), *self._waiting], ServingError("the server is shutting down"))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._let_leave()
            if not self._waiting and not self._running:
                self._work.clear()
                await self._work.wait()
                continue
            joins = self._waiting.popleft() if self._waiting and self.engine.free else None
            try:
                deltas = await loop.run_in_executor(self._thread, self._step, joins)
            except Exception as error:  # whatever a model can raise: it is told to every reader, and the next may try
                lost = [*self._running.values(), *([joins] if joins else [])]
                self.engine.clear()
                self._running.clear()
                self._fail(lost, ServingError(f"the model failed: {type(error).__name__}: {error}"))
                continue
            for request, delta in deltas:
                request.out.put_nowait((request.index, delta))
                self.totals.completion_tokens += len(delta.tokens)
                if delta.finish_reason is not None and request.generation is not None:
                    self._running.pop(request.generation, None)

    def _step(self, joins: _Request | None) -> list[tuple[_Request, Delta]]:
        """On the engine's thread, while the event loop lets requests wait: one prompt, then one step."""
        start = time.perf_counter()
        deltas = []
        if joins is not None:
            generation, delta = self.engine.add(joins.prompt, joins.sampling)
            joins.generation = generation
            self._running[generation] = joins
            deltas.append((joins, delta))
            self.totals.prompt_tokens += len(joins.prompt)
        deltas += [(self._running[generation], delta) for generation, delta in self.engine.step()]
        self.totals.steps += 1
        self.totals.step_seconds += time.perf_counter() - start
        return deltas

    def _let_leave(self) -> None:
        """Forget requests whose readers have gone."""
        for request in self._left:
            if request.generation is not None:
                self.engine.remove(request.generation)
                self._running.pop(request.generation, None)
            elif request in self._waiting:
                self._waiting.remove(request)
        self._left.clear()

    def _fail(self, requests: list[_Request], error: ServingError) -> None:
        for request in requests:
            request.out.put_nowait((request.index, error))


def _drained(queue: "asyncio.Queue[tuple[int, Delta | ServingError]]") -> "list[tuple[int, Delta | ServingError]]":
    """What is in a queue now."""
    return [queue.get_nowait() for _ in range(queue.qsize())]
