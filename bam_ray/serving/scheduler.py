"""The scheduler: drives the decode engine from asyncio, and streams the output of each request to its reader.

Requests wait in a queue, and start and leave between steps. One task owns the engine. The model runs on its own thread,
so the event loop stays free to make text of the tokens of a step while the next step is computed, and to send it.
`plan_step` decides what a step computes. When a reader closes its generator, its slots are freed before the next step.

A failure of one request ends that request alone. A failure that concerns all requests ends all of them, and serving
continues. After several of them in a row, or after an error outside the model, the scheduler stops (`failure`).
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bam_ray.errors import Overloaded, ServingError
from bam_ray.serving.detokenizer import TextStream
from bam_ray.serving.engine import DecodeEngine, Delta, Generation, Output
from bam_ray.serving.lora import SlotAdapter
from bam_ray.serving.plan import ServedTokens, WaitingRequest
from bam_ray.serving.sampling import SamplingParams
from bam_ray.serving.token_text import TokenTexts

_logger = logging.getLogger(__name__)

CHUNKS_PER_SECOND = 100
"""The number of chunks that all paced readers together receive per second. Each chunk costs the HTTP path milliseconds
(about 5 through Ray Serve), so under load one chunk carries several tokens."""
MAX_FAILED_STEPS = 3
"""The number of steps in a row that may fail for all requests before the scheduler stops."""

_Reader = asyncio.Queue[tuple[int, Delta | ServingError]]
"""The queue of a reader: the index of a prompt, and its new output or its error."""


@dataclass(eq=False)
class _Choice:
    """One completion of a prompt of a request, and the queue that receives its output."""

    index: int
    generation: Generation
    tenant: str
    output: _Reader
    text: TextStream
    is_done: bool = False  # its last delta has been sent
    has_left: bool = False  # it is not counted any more


@dataclass(eq=False)
class _Prompt:
    """A prompt of a request that waits, and its completions."""

    request: WaitingRequest
    choices: list[_Choice]


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
        failure: The error that has stopped the scheduler; None: it works. A stopped scheduler raises this error for
            every request, and its process must be replaced.
    """

    def __init__(
        self, engine: DecodeEngine, *, max_queued_prompts: int = 1024, max_queued_tokens: int = 1 << 20
    ) -> None:
        """Create a scheduler, which starts with the first request.

        Args:
            engine: The engine, which nothing else may use from now on.
            max_queued_prompts: The number of prompts that may wait for a slot.
            max_queued_tokens: The number of tokens that these prompts may have together.
        """
        self.engine = engine
        self.totals = SchedulerTotals()
        self.failure: ServingError | None = None
        self._max_queued_prompts, self._max_queued_tokens = max_queued_prompts, max_queued_tokens
        self._waiting: dict[int, _Prompt] = {}  # by id, in order of arrival; a dict, so that any of them leaves in O(1)
        self._waiting_tokens = 0
        self._running: dict[int, _Choice] = {}
        self._served = ServedTokens()
        self._abandoned: list[_Choice] = []  # their readers have disconnected
        self._when_left: list[Callable[[], None]] = []
        self._failed_steps = 0  # in a row
        self._token_texts = TokenTexts(engine.tokenizer)
        self._readers: set[_Reader] = set()
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

    @property
    def load(self) -> float:
        """The number of engines that the requests would fill, those that wait included.

        A request needs a share of the slots and a share of the memory for keys and values. The larger one counts.
        """
        slots, size = self.engine.slots, self.engine.memory.size
        running = max((slots - self.engine.free) / slots, self.engine.memory.used / size)
        # A request stays in the queue until the step that starts it is computed
        waiting = (queued.request for id_, queued in self._waiting.items() if not self.engine.has_started(id_))
        return running + sum(each.copies * max(1 / slots, each.reserved / size) for each in waiting)

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        paced: bool = False,
        tenant: str = "",
        adapter: SlotAdapter | None = None,
    ) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Continue each prompt, and yield the new output as (index, delta) pairs.

        The index is that of the prompt; with n completions of each prompt, it is `n * prompt + completion`. Closing
        the generator frees the slots.

        Args:
            prompts: The token ids of each prompt.
            params: The sampling parameters of all prompts.
            paced: Wait between yields if there are many readers, so that each yield carries more output.
            tenant: The client that the request belongs to. Tenants receive equally many tokens while they wait.
            adapter: The adapter of all prompts, which must stay in its slot; None: the base model.

        Raises:
            Overloaded: The queue is full. Nothing has been queued.
            ServingError: The model failed, the server is shutting down, or the completions can never fit.
        """
        self._check_queue(prompts, tenant)
        self.engine.check_size(max(map(len, prompts), default=1), params)
        return self._generate(prompts, params, paced, tenant, adapter)

    async def _generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        paced: bool,
        tenant: str,
        adapter: SlotAdapter | None,
    ) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        self._check_queue(prompts, tenant)  # the queue may have grown since the call
        if self._task is None:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._handle_end)
        output: _Reader = asyncio.Queue()
        unfinished: dict[int, _Choice] = {}
        for prompt in prompts:
            queued = self._queue(Generation(prompt, params, adapter=adapter), len(unfinished), tenant, output)
            unfinished |= {choice.index: choice for choice in queued.choices}
        self._work_available.set()
        self._readers.add(output)
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
                next_time = time.monotonic() + len(self._readers) / CHUNKS_PER_SECOND
                yield list(merged.items())
        finally:
            self._readers.remove(output)
            self._abandoned.extend(unfinished.values())
            self._work_available.set()

    def when_left(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the engine does not compute the requests any more whose generators are closed now.

        A step that is being computed may still use what such a request uses, for example the slot of its adapter.
        """
        if self._task is None or self._task.done():
            callback()
        else:
            self._when_left.append(callback)
            self._work_available.set()

    async def close(self) -> None:
        """Stop the engine. Readers that are still open receive a `ServingError`."""
        self.failure = self.failure or ServingError("the server is shutting down: retry later")
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()
        self.engine.clear()
        self._fail_all(self.failure)

    def _check_queue(self, prompts: list[list[int]], tenant: str) -> None:
        """Raise `Overloaded` if the queue has no room for all prompts, or `failure` if the scheduler has stopped.

        A tenant may have as many prompts and tokens in the queue as it leaves free. So no tenant can fill the queue
        alone, and others find room. The tenant without a name, which has no API key, may fill it.
        """
        if self.failure is not None:
            raise self.failure
        queued, tokens = len(self._waiting), self._waiting_tokens
        new_tokens = sum(len(prompt) for prompt in prompts)
        own = [each.request.prompt for each in self._waiting.values() if tenant and each.request.tenant == tenant]
        if (
            len(own) + queued + len(prompts) > self._max_queued_prompts
            or sum(own) + tokens + new_tokens > self._max_queued_tokens
        ):
            retry_after = self._seconds_to_compute(tokens)
            raise Overloaded(
                f"the queue holds {queued} of {self._max_queued_prompts} prompts and {tokens} of "
                f"{self._max_queued_tokens} tokens, so {len(prompts)} prompts of {new_tokens} tokens do not fit: retry "
                f"after {retry_after:.0f} s",
                retry_after,
            )

    def _seconds_to_compute(self, tokens: int) -> float:
        """Return the time that the engine needs for `tokens` at its mean speed so far, 1 to 60 seconds."""
        computed = self.totals.prompt_tokens + self.totals.completion_tokens
        return min(60.0, max(1.0, tokens * self.totals.step_seconds / max(1, computed)))

    async def _run(self) -> None:
        """Drive the engine. Ends with an error only if the engine cannot be used any more."""
        loop = asyncio.get_running_loop()
        computed: list[tuple[_Choice, Output]] = []
        while True:
            leaving = self._take_abandoned()
            when_left, self._when_left = self._when_left, []
            if not self._waiting and not self._running and not leaving:
                _call_all(when_left)
                self._work_available.clear()
                self._deliver(computed)
                computed = []
                await self._work_available.wait()
                continue
            waiting = [queued.request for queued in self._waiting.values()]
            step = loop.run_in_executor(self._thread, self._step, waiting, leaving)
            self._deliver(computed)  # while the engine computes
            try:
                computed = self._account(*await step)
            finally:
                _call_all(when_left)
            if self._failed_steps >= MAX_FAILED_STEPS:
                self._deliver(computed)
                computed = []
                await loop.run_in_executor(self._thread, self._check_engine)
                self._failed_steps = 0

    def _step(
        self, waiting: list[WaitingRequest], leaving: list[Generation]
    ) -> tuple[Sequence[int], list[tuple[Generation, Output]]]:
        """Free slots, plan a step and compute it. Runs on the engine's thread.

        Returns:
            The ids of the requests that have started, and the output of the step.
        """
        start = time.perf_counter()
        for generation in leaving:
            self.engine.remove(generation)
        plan = self.engine.plan(waiting, self._served.tokens)
        started = [self._waiting[id_].choices[0].generation for id_ in plan.start]
        try:
            for generation in started:
                self.engine.start(generation)
            outputs = self.engine.step(plan)
        except Exception as error:  # a model can raise anything, and this error concerns all requests
            self.engine.clear()
            active = [*started, *(choice.generation for choice in self._running.values())]
            outputs = [(generation, Output(error=error)) for generation in active]
        self.totals.steps += 1
        self.totals.step_seconds += time.perf_counter() - start
        return plan.start, outputs

    def _account(
        self, started: Sequence[int], outputs: list[tuple[Generation, Output]]
    ) -> list[tuple[_Choice, Output]]:
        """Count what a step has computed, forget the requests that have ended, and return what must be delivered."""
        for id_ in started:
            queued = self._take_waiting(id_)
            self._running |= {choice.generation.id: choice for choice in queued.choices}
            self.totals.prompt_tokens += queued.request.prompt
            self._served.add(queued.request.tenant, queued.request.prompt)
        computed = [(self._running[generation.id], output) for generation, output in outputs]
        for choice, output in computed:
            tokens = int(output.sampled is not None)
            self.totals.completion_tokens += tokens
            self._served.add(choice.tenant, tokens)
            if output.is_last:
                self._leave(choice)
        errors = [output.error for _, output in outputs]
        if None in errors:
            self._failed_steps = 0
        elif not all(map(_is_out_of_memory, errors)):  # a prompt without memory says nothing of the engine
            self._failed_steps += 1
        return computed

    def _deliver(self, computed: list[tuple[_Choice, Output]]) -> None:
        """Send the output of a step to the readers."""
        for choice, output in computed:
            if choice.is_done:  # a stop string was found while the step was computed
                continue
            try:
                delta = _client_error(output.error) if output.error else choice.text.feed(output)
            except Exception as error:  # a tokenizer can raise anything: the completion fails alone
                delta = _client_error(error)
            choice.output.put_nowait((choice.index, delta))
            choice.is_done = isinstance(delta, ServingError) or delta.finish_reason is not None
            if choice.is_done and not output.is_last:
                self._abandoned.append(choice)
                self._work_available.set()

    def _check_engine(self) -> None:
        """Decode a short text. Raises `ServingError` if the engine cannot do it. Runs on the engine's thread."""
        try:
            self.engine.test()
        except Exception as error:
            raise ServingError(
                f"the model failed in {MAX_FAILED_STEPS} steps in a row and in a test after them: restart the server"
            ) from error

    def _queue(self, generation: Generation, index: int, tenant: str, output: _Reader) -> _Prompt:
        """Add a prompt to the queue. `index` is that of its first completion."""
        generations = [generation, *generation.copies]
        choices = [
            _Choice(
                index + number, each, tenant, output, TextStream(self.engine.tokenizer, each.params, self._token_texts)
            )
            for number, each in enumerate(generations)
        ]
        queued = _Prompt(self.engine.waiting_request(generation, tenant), choices)
        self._waiting[generation.id] = queued
        self._waiting_tokens += queued.request.prompt
        for _ in choices:
            self._served.arrive(tenant)
        return queued

    def _take_waiting(self, id_: int) -> _Prompt:
        """Remove a prompt from the queue."""
        queued = self._waiting.pop(id_)
        self._waiting_tokens -= queued.request.prompt
        return queued

    def _leave(self, choice: _Choice) -> None:
        """Forget a completion that has ended, or whose reader has disconnected."""
        self._running.pop(choice.generation.id, None)
        if not choice.has_left:
            choice.has_left = True
            self._served.leave(choice.tenant)

    def _take_abandoned(self) -> list[Generation]:
        """Forget the prompts whose readers have disconnected, and return those whose slots must be freed."""
        leaving = []
        for choice in self._abandoned:
            if choice.generation.id in self._waiting:
                self._take_waiting(choice.generation.id)
            elif choice.generation.id in self._running:
                leaving.append(choice.generation)
            self._leave(choice)
        self._abandoned.clear()
        return leaving

    def _handle_end(self, task: asyncio.Task[None]) -> None:
        """Stop serving if the task that owns the engine has ended with an error."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _logger.error("the decode engine has stopped", exc_info=error)
            stopped = ServingError("the decode engine has stopped: see the log of the server, and restart it")
            self.failure = error if isinstance(error, ServingError) else stopped
            self._fail_all(self.failure)

    def _fail_all(self, error: ServingError) -> None:
        for output in self._readers:
            output.put_nowait((0, error))
        self._running.clear()
        self._waiting.clear()
        self._waiting_tokens = 0
        when_left, self._when_left = self._when_left, []
        _call_all(when_left)


def _call_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        callback()


def _is_out_of_memory(error: Exception | None) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def _client_error(error: Exception) -> ServingError:
    """Log an error of the model, and return the error for the client: the message may contain paths."""
    _logger.error("the model failed", exc_info=error)
    memory = _is_out_of_memory(error)
    reason = "out of memory: send a shorter prompt, or retry later" if memory else "see the log of the server"
    return ServingError(f"the model failed: {reason}")


def _drain(queue: _Reader) -> list[tuple[int, Delta | ServingError]]:
    """Return the current items of a queue without waiting."""
    return [queue.get_nowait() for _ in range(queue.qsize())]
