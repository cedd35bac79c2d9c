"""The adapters that a server offers: which adapter a request uses, and its lease while the request runs.

A request chooses by the name of its model: `<base>` means the base model, `<topic>` or `<base>:<topic>` an adapter, and
`auto` the adapter of the topic that is nearest to the text. Adapters that are added to the source, or removed from it,
are found without a restart.
"""

import asyncio
import difflib
import itertools
import logging
import reprlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel

from bam_ray.adapters.pool import AdapterLease, AdapterPool
from bam_ray.adapters.source import AdapterKey, AdapterSource
from bam_ray.errors import AdapterUnavailable
from bam_ray.serving.lora import SlotAdapter
from bam_ray.serving.openai_types import RequestError

_logger = logging.getLogger(__name__)

AUTO = "auto"
"""The name of the model that chooses the adapter of each request."""
REFRESH_SECONDS = 5.0
"""The age at which the list of adapters is read again."""
UNKNOWN_REFRESH_SECONDS = 1.0
"""The same, if a name is unknown or an adapter cannot be loaded."""
ROUTING_THREADS = 2
"""The number of threads that find the topics of texts."""
MOST_COMPARED = 100
"""The number of adapters that an unknown name is compared with, because all other requests wait meanwhile."""

ChoiceReason = Literal["override", "nearest", "far", "unavailable"]
WhenUnavailable = Literal["base", "wait", "error"]


class NearestTopic(Protocol):
    """The topic of a text, as `bam_ray.adapters.topics` finds it."""

    @property
    def topic(self) -> str | None:
        """The name of the topic; None if the text is far from all topics."""
        ...

    @property
    def score(self) -> float:
        """The similarity to the nearest topic."""
        ...

    @property
    def margin(self) -> float:
        """The score minus that of the second nearest topic."""
        ...

    @property
    def threshold(self) -> float:
        """The smallest score with which a text belongs to the nearest topic."""
        ...


class TopicRouter(Protocol):
    """A function that finds the topic of a text. It is called on a thread."""

    def __call__(self, text: str) -> NearestTopic:
        """Return the topic of a text."""
        ...


class AdapterUse(BaseModel):
    """The adapter of a request, and the reason.

    `reason` is `override` if the request names the model, `nearest` if its text is near a topic, `far` if it is not,
    and `unavailable` if the adapter cannot be loaded or does not exist, so that the base model is used.
    """

    requested: str  # the model that the request names
    adapter: str | None  # None: the base model
    reason: ChoiceReason
    score: float | None = None  # cosine similarity to the nearest topic, with `auto`
    margin: float | None = None  # the score minus that of the second nearest topic
    threshold: float | None = None  # the smallest score with which a text belongs to the nearest topic
    tier: str | None = None  # where the adapter was when the request came
    route_ms: float | None = None  # the time to choose the adapter
    load_ms: float | None = None  # the time until the adapter was on the device

    @property
    def headers(self) -> dict[str, str]:
        """The fields as headers of the response."""
        fields = {
            "": self.adapter or "none",
            "-reason": self.reason,
            "-score": None if self.score is None else f"{self.score:.4f}",
            "-margin": None if self.margin is None else f"{self.margin:.4f}",
            "-tier": self.tier,
        }
        headers = {f"x-bam-adapter{name}": value for name, value in fields.items() if value is not None}
        return headers | ({} if self.route_ms is None else {"x-bam-route-ms": f"{self.route_ms:.1f}"})


class AdapterInfo(BaseModel):
    """An entry of /v1/adapters."""

    id: str
    model: str  # the name of the model with this adapter
    version: str
    tier: str  # `device`, `host`, or the storage of the source


class AdapterInfoList(BaseModel):
    """The response of /v1/adapters."""

    object: Literal["list"] = "list"
    data: list[AdapterInfo]


@dataclass(frozen=True)
class AdapterOptions:
    """The rules of a server for adapters that cannot be loaded."""

    on_unavailable: WhenUnavailable = "error"
    max_wait_seconds: float = 30.0  # with `wait`


class ServedAdapters:
    """The adapters of one base model. All calls come from one event loop.

    Attributes:
        base: The name of the base model.
        pool: The adapters in memory.
        can_choose: True if `auto` is offered.
    """

    def __init__(
        self,
        base: str,
        source: AdapterSource,
        pool: AdapterPool,
        executor: Executor,
        *,
        router: TopicRouter | None = None,
        options: AdapterOptions | None = None,
    ) -> None:
        """Create an offer.

        Args:
            base: The name of the base model.
            source: The source of the adapters, which is read once now.
            pool: The pool, which has the same source.
            executor: The threads that read the source.
            router: Finds the topic of a text; None: `auto` is not offered.
            options: The rules for adapters that cannot be loaded.

        Raises:
            BamError: The source cannot be read.
        """
        self.base, self.pool, self.can_choose = base, pool, router is not None
        self._source, self._executor, self._router = source, executor, router
        # A slow source must not delay the choice of a topic
        self._routing = ThreadPoolExecutor(ROUTING_THREADS, thread_name_prefix="topics")
        self._options = options or AdapterOptions()
        self._keys: Mapping[str, AdapterKey] = source.keys()
        self._read_at = time.monotonic()
        self._reading: asyncio.Task[None] | None = None

    async def choose(self, model: str, text: str) -> AdapterUse:
        """Return the adapter for a request that names `model`. `text` decides if that is `auto`.

        Raises:
            RequestError: There is no such model.
        """
        if model != AUTO or self._router is None:
            key = await self.find(model)
            return AdapterUse(requested=model, adapter=None if key is None else key.name, reason="override")
        start = time.perf_counter()
        nearest = await asyncio.get_running_loop().run_in_executor(self._routing, self._router, text)
        use = AdapterUse(
            requested=model,
            adapter=nearest.topic,
            reason="far" if nearest.topic is None else "nearest",
            score=nearest.score,
            margin=nearest.margin,
            threshold=nearest.threshold,
        )
        if nearest.topic is not None and await self._key(nearest.topic) is None:
            use.adapter, use.reason = None, "unavailable"
        use.route_ms = (time.perf_counter() - start) * 1000
        return use

    async def find(self, model: str) -> AdapterKey | None:
        """Return the adapter that a model has, or None for the base model and `auto`.

        Raises:
            RequestError: There is no such model.
        """
        if model == self.base or (model == AUTO and self.can_choose):
            return None
        key = await self._key(model.removeprefix(f"{self.base}:"))
        if key is None:
            names = [self.base, *([AUTO] if self.can_choose else []), *itertools.islice(self._keys, MOST_COMPARED)]
            close = difflib.get_close_matches(model.removeprefix(f"{self.base}:")[:64], names, n=1, cutoff=0.0)
            message = f"model {reprlib.repr(model)} is not served here: use {close[0]!r}, or see /v1/models"
            raise RequestError(404, message, code="model_not_found", param="model")
        return key

    @asynccontextmanager
    async def lease(
        self, use: AdapterUse, when_left: Callable[[Callable[[], None]], None]
    ) -> AsyncGenerator[SlotAdapter | None, None]:
        """Keep the adapter of a request on the device.

        Args:
            use: The choice for the request. It is changed to what the request really uses.
            when_left: Calls a function when the engine does not compute the request any more
                (`Scheduler.when_left`).

        Raises:
            AdapterUnavailable: The adapter cannot be loaded, and the base model may not replace it.
            Overloaded: Too many requests wait for adapters.
        """
        if use.adapter is None:
            yield None
            return
        start = time.perf_counter()
        try:
            lease = await self._acquire(use, start)
        except AdapterUnavailable:
            if self._options.on_unavailable != "base" or use.requested != AUTO:
                raise
            use.adapter, use.reason = None, "unavailable"
            yield None
            return
        use.tier, use.load_ms = lease.tier, (time.perf_counter() - start) * 1000
        try:
            yield SlotAdapter(str(lease.key), lease.slot)
        finally:
            when_left(lease.release)

    def model_of(self, adapter: str | None) -> str:
        """Return the name of the model with an adapter."""
        return self.base if adapter is None else f"{self.base}:{adapter}"

    async def infos(self, tier: str | None = None, text: str = "") -> AdapterInfoList:
        """Return the adapters whose names contain `text`, of one tier or of all."""
        await self._refresh(UNKNOWN_REFRESH_SECONDS)
        entries = (
            AdapterInfo(id=name, model=self.model_of(name), version=key.version, tier=self.pool.tier(key))
            for name, key in self._keys.items()
            if text in name
        )
        return AdapterInfoList(data=[each for each in entries if tier in (None, each.tier)])

    async def _acquire(self, use: AdapterUse, start: float) -> AdapterLease:
        """Return the lease of the adapter of a request."""
        assert use.adapter is not None
        while True:
            key = await self._key(use.adapter)
            if key is None:
                raise AdapterUnavailable(f"adapter {use.adapter} was removed: choose another one", REFRESH_SECONDS)
            try:
                return await self.pool.acquire(key)
            except AdapterUnavailable as error:
                await self._refresh(UNKNOWN_REFRESH_SECONDS)
                if self._keys.get(use.adapter) not in (key, None):
                    continue  # it was changed
                waited = time.perf_counter() - start
                left = self._options.max_wait_seconds - waited
                if self._options.on_unavailable != "wait" or error.retry_after > left:
                    raise
                await asyncio.sleep(error.retry_after)

    async def _key(self, name: str) -> AdapterKey | None:
        """Return the key of an adapter, or None if there is none."""
        if name not in self._keys:
            await self._refresh(UNKNOWN_REFRESH_SECONDS)
        elif time.monotonic() - self._read_at > REFRESH_SECONDS:
            self._start_reading()
        return self._keys.get(name)

    async def _refresh(self, age: float) -> None:
        """Read the list of adapters again if it is older than `age` seconds."""
        if time.monotonic() - self._read_at >= age:
            await asyncio.shield(self._start_reading())

    def _start_reading(self) -> asyncio.Task[None]:
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        return self._reading

    async def _read(self) -> None:
        try:
            self._keys = await asyncio.get_running_loop().run_in_executor(self._executor, self._source.keys)
        except Exception:  # the source is away: those that are known may be in memory
            _logger.warning("the list of adapters cannot be read", exc_info=True)
        self._read_at = time.monotonic()
