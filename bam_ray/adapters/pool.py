"""The pool of adapters: keeps the adapters that requests use on the device, and recently used ones in host memory.

    lease = await pool.acquire(key)     # loads the adapter if needed, and keeps it on the device
    ...                                 # decode with `lease.slot`
    lease.release()

Adapters move from the source to host memory, and from there to a slot of the device. Each is loaded once, whatever the
number of requests that wait for it. Loads run on threads. An adapter with a lease stays in its slot; of the others, the
least recently used one makes way. Host memory holds adapters up to a number of bytes, and the least recently used ones
make way.

If all slots have leases, requests for other adapters wait. Requests for the adapters in the slots are served meanwhile,
until the first one that waits has waited `max_wait_seconds`. From then on, all requests are served in the order of
arrival, so that the slots become free.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from bam_ray.adapters.source import AdapterKey, AdapterSource
from bam_ray.adapters.weights import AdapterWeights
from bam_ray.errors import AdapterUnavailable, BamError, Overloaded

_logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 1.0
"""The time after a failed load in which requests for the adapter fail at once. It doubles with each further failure."""
LAST_RETRY_SECONDS = 60.0


class AdapterDevice(Protocol):
    """The memory of the device: slots 1 to `slots`."""

    slots: int

    def check(self, weights: AdapterWeights) -> None:
        """Raise `BamError` if an adapter cannot be written to a slot."""
        ...

    def write(self, slot: int, weights: AdapterWeights) -> None:
        """Copy an adapter to a slot that nothing uses."""
        ...


class AdapterLease:
    """The right to use an adapter on the device until `release` is called.

    Attributes:
        key: The adapter.
        slot: Its slot.
        tier: Where the adapter was when it was acquired: `device`, `host`, or the tier of the source.
    """

    def __init__(self, key: AdapterKey, slot: int, tier: str, on_release: Callable[[], None]) -> None:
        self.key, self.slot, self.tier = key, slot, tier
        self._on_release: Callable[[], None] | None = on_release

    def release(self) -> None:
        """End the lease. Further calls have no effect."""
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release()


@dataclass(eq=False)
class _Resident:
    """An adapter that has a slot. `loaded` ends when its weights are there."""

    slot: int
    loaded: asyncio.Future[None]
    leases: int = 0


@dataclass(eq=False)
class _Waiter:
    """A request that waits for a slot."""

    key: AdapterKey
    since: float
    granted: asyncio.Future[_Resident]

    def fail(self, error: AdapterUnavailable) -> None:
        """End the wait with an error."""
        if not self.granted.done():
            self.granted.set_exception(error)


@dataclass
class _Failure:
    """Failed loads of an adapter in a row."""

    count: int = 0
    retry_at: float = 0.0


@dataclass
class PoolCounts:
    """Counters since the start of the pool."""

    acquired: dict[str, int] = field(default_factory=dict)  # by the tier at which the adapter was found
    fetches: int = 0
    failed_loads: int = 0


class AdapterPool:
    """A pool whose methods are called from one event loop.

    Attributes:
        counts: What has happened since the start.
        host_used: The size of the adapters in host memory, in bytes.
    """

    def __init__(
        self,
        source: AdapterSource,
        device: AdapterDevice,
        executor: Executor,
        *,
        host_bytes: int,
        max_wait_seconds: float = 2.0,
        max_waiting: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create an empty pool.

        Args:
            source: The adapters.
            device: The slots.
            executor: The threads that load adapters.
            host_bytes: The size of the adapters that are kept in host memory. At least one is kept.
            max_wait_seconds: The time after which a request that waits for a slot holds up later ones.
            max_waiting: The number of requests that may wait for a slot.
            clock: The time in seconds.
        """
        self.counts = PoolCounts()
        self._source, self._device, self._executor, self._clock = source, device, executor, clock
        self._host_bytes, self._max_wait, self._max_waiting = host_bytes, max_wait_seconds, max_waiting
        self._host: OrderedDict[AdapterKey, AdapterWeights] = OrderedDict()  # the least recently used one first
        self.host_used = 0
        self._fetching: set[AdapterKey] = set()
        self._failures: dict[AdapterKey, _Failure] = {}
        self._resident: OrderedDict[AdapterKey, _Resident] = OrderedDict()  # the least recently used one first
        self._free = [*range(device.slots, 0, -1)]
        self._waiters: list[_Waiter] = []
        self._window = device.slots  # the number of requests that wait whose adapters are loaded to host memory
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def resident(self) -> list[AdapterKey]:
        """The adapters that are on the device."""
        return [key for key, each in self._resident.items() if each.loaded.done()]

    @property
    def hosted(self) -> list[AdapterKey]:
        """The adapters that are in host memory."""
        return [*self._host]

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return len(self._waiters)

    def tier(self, key: AdapterKey) -> str:
        """Return where an adapter is: `device`, `host`, or the tier of the source."""
        if key in self._resident:
            return "device"
        return "host" if key in self._host else self._source.tier

    async def acquire(self, key: AdapterKey) -> AdapterLease:
        """Load an adapter to the device if it is not there, and keep it there.

        Raises:
            AdapterUnavailable: It cannot be loaded, or it could not be loaded a short time ago.
            Overloaded: Too many requests wait for a slot.
        """
        tier = self.tier(key)
        failure = self._failures.get(key)
        if failure is not None and failure.retry_at > self._clock():
            raise _unavailable(key, failure.retry_at - self._clock())
        if len(self._waiters) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiters)} requests wait for an adapter slot: retry later", self._max_wait)
        waiter = _Waiter(key, self._clock(), asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self._grant()
        try:
            resident = await waiter.granted
        except asyncio.CancelledError:
            self._forget(waiter)
            raise
        lease = AdapterLease(key, resident.slot, tier, partial(self._release, key, resident))
        try:
            await asyncio.shield(resident.loaded)
        except BaseException:
            lease.release()
            raise
        self.counts.acquired[tier] = self.counts.acquired.get(tier, 0) + 1
        return lease

    async def close(self) -> None:
        """Stop all loads. Requests that wait receive `AdapterUnavailable`."""
        waiting, self._waiters = self._waiters, []
        for waiter in waiting:
            waiter.fail(AdapterUnavailable("the server is shutting down: retry later", 1.0))
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, waiter: _Waiter) -> None:
        """Remove a request that has left while it waited, or just after it was granted its slot."""
        if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
            self._release(waiter.key, waiter.granted.result())
        else:
            self._grant()

    def _release(self, key: AdapterKey, resident: _Resident) -> None:
        resident.leases -= 1
        if self._resident.get(key) is resident:
            self._resident.move_to_end(key)
        self._grant()

    def _grant(self) -> None:
        """Give slots to the requests that wait, in the order of arrival, and begin the loads that they need next."""
        waiting = [waiter for waiter in self._waiters if not waiter.granted.done()]  # the others have left
        self._waiters = []
        for place, waiter in enumerate(waiting):
            resident = self._resident.get(waiter.key) or self._load(waiter.key)
            if resident is not None:
                resident.leases += 1
                self._resident.move_to_end(waiter.key)
                waiter.granted.set_result(resident)
                continue
            self._waiters.append(waiter)
            if waiter.key not in self._host and len(self._waiters) <= self._window:
                self._start_fetch(waiter.key)
            if self._clock() - self._waiters[0].since >= self._max_wait:
                self._waiters += waiting[place + 1 :]
                break

    def _load(self, key: AdapterKey) -> _Resident | None:
        """Begin to copy an adapter to a slot, and return it; None: it is not in host memory, or no slot is free."""
        if key not in self._host:
            return None
        if not self._free:
            unused = next((each for each, its in self._resident.items() if not its.leases and its.loaded.done()), None)
            if unused is None:
                return None
            self._free.append(self._resident.pop(unused).slot)
        resident = _Resident(self._free.pop(), asyncio.get_running_loop().create_future())
        resident.loaded.add_done_callback(_retrieve)
        self._resident[key] = resident
        self._host.move_to_end(key)
        self._run(self._write(key, self._host[key], resident))
        return resident

    async def _write(self, key: AdapterKey, weights: AdapterWeights, resident: _Resident) -> None:
        """Copy an adapter to its slot."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._executor, self._device.write, resident.slot, weights)
        except BaseException as error:
            del self._resident[key]
            self._free.append(resident.slot)
            resident.loaded.set_exception(self._failed(key, error))
            if not isinstance(error, Exception):
                raise
        else:
            self._failures.pop(key, None)
            resident.loaded.set_result(None)
        self._grant()

    def _start_fetch(self, key: AdapterKey) -> None:
        if key not in self._fetching:
            self._fetching.add(key)
            self._run(self._fetch(key))

    async def _fetch(self, key: AdapterKey) -> None:
        """Fetch an adapter from the source to host memory. If that fails, so do the requests that wait for it."""
        loop = asyncio.get_running_loop()
        self.counts.fetches += 1
        try:
            weights = await loop.run_in_executor(self._executor, self._read, key)
        except Exception as error:  # a source can raise anything
            unavailable = self._failed(key, error)
            for waiter in self._waiters:
                if waiter.key == key:
                    waiter.fail(unavailable)
        else:
            self._keep(key, weights)
        finally:
            self._fetching.discard(key)
        self._grant()

    def _read(self, key: AdapterKey) -> AdapterWeights:
        weights = self._source.fetch(key)
        self._device.check(weights)
        return weights

    def _keep(self, key: AdapterKey, weights: AdapterWeights) -> None:
        """Keep an adapter in host memory. Those that the next requests wait for stay there, as far as they fit."""
        self._host[key] = weights
        self.host_used += weights.bytes
        awaited = {waiter.key for waiter in self._waiters[: self._window]}
        while self.host_used > self._host_bytes and len(self._host) > 1:
            drop = next((each for each in self._host if each not in awaited), next(iter(self._host)))
            self.host_used -= self._host.pop(drop).bytes
            self._window = min(self._device.slots, len(self._host))

    def _failed(self, key: AdapterKey, error: BaseException) -> AdapterUnavailable:
        """Note that a load of an adapter has failed, and return the error for the requests that wait for it."""
        self.counts.failed_loads += 1
        # The reason may contain paths, which are not for clients
        _logger.warning("adapter %s cannot be loaded: %s", key, error, exc_info=not isinstance(error, BamError))
        failure = self._failures.setdefault(key, _Failure())
        seconds = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2**failure.count)
        failure.count, failure.retry_at = failure.count + 1, self._clock() + seconds
        return _unavailable(key, seconds)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop has no strong reference to a task
        task.add_done_callback(self._tasks.discard)


def _unavailable(key: AdapterKey, seconds: float) -> AdapterUnavailable:
    return AdapterUnavailable(
        f"adapter {key.name} cannot be loaded now: retry after {seconds:.0f} s, or see the log of the server", seconds
    )


def _retrieve(done: asyncio.Future[None]) -> None:
    """Mark the error of a future as seen, because all requests that wait for it may have left."""
    if not done.cancelled():
        done.exception()
