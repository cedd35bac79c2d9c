"""Turns of tenants at something that one request can use at a time."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from bam_ray.errors import Overloaded

RETRY_SECONDS = 1.0  # after which a client should try again if too many requests wait


class Turns:
    """A lock that goes round the tenants, so that a tenant with many requests delays another by one of them at most.

    A tenant may have as many waiting requests as it leaves free. So no tenant can fill the queue alone. The tenant
    without a name, which has no API key, may fill it.
    """

    def __init__(self, max_waiting: int, purpose: str) -> None:
        """Create a lock that nobody holds.

        Args:
            max_waiting: The number of requests that may wait.
            purpose: The words after "wait" in the error of a request that would be one too many.
        """
        self._max_waiting, self._purpose = max_waiting, purpose
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by tenant; the next turn is that of the first
        self._is_taken = False

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncGenerator[None, None]:
        """Hold the lock. Raises `Overloaded` if too many requests wait."""
        await self._wait(tenant)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, tenant: str) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        own = len(self._waiting.get(tenant, ())) if tenant else 0
        if own + sum(map(len, self._waiting.values())) >= self._max_waiting:
            raise Overloaded(f"too many requests wait {self._purpose}: retry later", RETRY_SECONDS)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it came at the same time
                self._pass_on()
            elif turn in self._waiting.get(tenant, ()):
                self._waiting[tenant].remove(turn)
            raise

    def _pass_on(self) -> None:
        """Give the lock to the oldest request of the next tenant."""
        while self._waiting:
            tenant = next(iter(self._waiting))
            requests = self._waiting.pop(tenant)
            if not requests:
                continue
            turn = requests.popleft()
            if requests:
                self._waiting[tenant] = requests  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._is_taken = False
