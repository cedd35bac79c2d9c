"""A proxy in front of an S3 server that fails as networks and servers do.

It forwards all bytes unchanged, also the Host header, so signed requests stay valid. It can answer 503 to everything,
delay its answers, or apply a `Fault` to some requests: answer with an error in the server's place, lose the answer to a
request that the server has carried out, or cut the body of an answer.

Example:
    proxy = FlakyProxy(port)
    lost = proxy.add(Fault.lost_answer("PUT", key="/manifest.json$", times=1))
    ...                                         # clients use proxy.endpoint
    assert lost.hits == 1
"""

import asyncio
import contextlib
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from tests.support.faults.http_relay import BODILESS, Head, body, read_head

REFUSAL = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass
class Fault:
    """A fault of some requests, by method and key.

    Attributes:
        kind: "answer": an error in the server's place; "lost": the server carries the request out, and the connection
            is closed instead of its answer; "cut": the connection is closed within the body of the answer.
        method: The method of the requests; None: any.
        key: A regular expression that is searched for in the key (the path without the bucket).
        header: A regular expression that is searched for in the first line and the headers; case does not matter.
        times: The number of requests to hit; None: all.
        chance: The probability that a request that matches is hit.
        status: The status of an answer in the server's place.
        code: The error code of an answer in the server's place.
        details: Further XML elements of that answer.
        after: The bytes of the body that a cut lets pass; None: half of them.
        action: Called in a thread before the connection is closed or the answer is sent.
        hits: The number of requests that were hit.
    """

    kind: Literal["answer", "lost", "cut"]
    method: str | None = None
    key: str = ""
    header: str = ""
    times: int | None = None
    chance: float = 1.0
    status: int = 403
    code: str = "AccessDenied"
    details: str = "<Message>Access Denied.</Message>"
    after: int | None = None
    action: Callable[[], object] | None = None
    hits: int = 0

    @staticmethod
    def denied(method: str | None = None, **where: Any) -> "Fault":
        """Return a fault that answers 403 AccessDenied."""
        return Fault("answer", method, **where)

    @staticmethod
    def lost_answer(method: str | None = None, **where: Any) -> "Fault":
        """Return a fault that loses the answers to requests that the server has carried out."""
        return Fault("lost", method, **where)

    @staticmethod
    def cut_body(after: int | None = None, **where: Any) -> "Fault":
        """Return a fault that closes the connection within the body of an answer to a GET."""
        return Fault("cut", "GET", after=after, **where)

    def matches(self, request: Head) -> bool:
        """Return True if the fault is for this request and is not used up."""
        if self.times is not None and self.hits >= self.times:
            return False
        if self.method not in (None, request.method) or not re.search(self.key, request.key):
            return False
        return re.search(self.header, request.raw.decode("latin-1"), re.IGNORECASE) is not None

    def answer(self, request: Head) -> bytes:
        """Return the answer in the server's place."""
        text = f"<?xml version='1.0'?><Error><Code>{self.code}</Code>{self.details}</Error>".encode()
        head = f"HTTP/1.1 {self.status} Fault\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n"
        return head.encode() + b"Connection: close\r\n\r\n" + (b"" if request.method == "HEAD" else text)


class FlakyProxy:
    """A proxy on a free port of 127.0.0.1, which forwards to `port` on the same host once `port` has been set.

    Args:
        port: The port of the server.
        seed: The seed of the faults that have a `chance`.
    """

    def __init__(self, port: int = 0, seed: int = 0) -> None:
        self.port = port
        self.refused = 0
        self.sent = 0  # bytes of bodies that clients were sent
        self._refusing = False
        self._factor = 1.0
        self._faults: list[Fault] = []
        self._random = random.Random(seed)
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="flaky-proxy", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0)).result()

    @property
    def endpoint(self) -> str:
        """The URL that clients connect to."""
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def refuse(self) -> None:
        """Answer 503 to every request until `recover` is called."""
        self._refusing = True
        self._drop()

    def slow_down(self, factor: float) -> None:
        """Delay every answer until it has taken `factor` times as long as the server needed."""
        self._factor = factor

    def add(self, fault: Fault) -> Fault:
        """Apply `fault` from now on, and return it. The first fault that matches a request is applied."""
        self._faults = [*self._faults, fault]
        return fault

    def recover(self) -> None:
        """Forward all requests without a delay or a fault again."""
        self._refusing, self._factor, self._faults = False, 1.0, []

    def close(self) -> None:
        """Stop the proxy."""

        async def end() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _drop(self) -> None:
        """Close all connections, so that clients open new ones."""

        def close_all() -> None:
            for writer in list(self._open):
                writer.close()

        self._loop.call_soon_threadsafe(close_all)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened = [writer]
        self._open.add(writer)
        try:
            if self._refusing:
                self.refused += 1
                await reader.readuntil(b"\r\n\r\n")
                writer.write(REFUSAL)
                await writer.drain()
                return
            answers, upstream = await asyncio.open_connection("127.0.0.1", self.port)
            opened.append(upstream)
            self._open.add(upstream)
            while (request := await read_head(reader)) is not None:
                if not await self._exchange(request, (reader, writer), (answers, upstream)):
                    return
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # the server or the client has closed the connection
        finally:
            for each in opened:
                self._open.discard(each)
                each.close()

    async def _exchange(
        self,
        request: Head,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> bool:
        """Relay one request and its answer; return False if the connection must be closed."""
        fault = self._fault_of(request)
        if fault is not None and fault.kind == "answer":
            if not request.header("Expect"):  # otherwise the client sends its body only after a go-ahead
                async for _ in body(request, client[0]):
                    pass
            await self._act(fault)
            client[1].write(fault.answer(request))
            await client[1].drain()
            return False
        sending = asyncio.ensure_future(_send(request, client[0], server[1]))
        try:
            return await self._relay_answer(request, fault, server[0], client[1]) and sending.done()
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError, EOFError):
                await sending

    async def _relay_answer(
        self, request: Head, fault: Fault | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Relay the answer to a request; return False if the connection must be closed."""
        asked = time.monotonic()
        while (answer := await read_head(reader)) is not None:
            if answer.status >= 200:
                break
            writer.write(answer.raw)  # 100 Continue
        if answer is None:
            return False
        if fault is not None and fault.kind == "lost":
            await self._act(fault)
            return False
        await asyncio.sleep((self._factor - 1.0) * (time.monotonic() - asked))
        writer.write(answer.raw)
        if request.method == "HEAD" or answer.status in BODILESS:
            await writer.drain()
            return True
        left = None
        if fault is not None and fault.kind == "cut":
            length = int(answer.header("Content-Length") or 0)
            left = length // 2 if fault.after is None else fault.after
        asked = time.monotonic()
        async for piece in body(answer, reader):
            await asyncio.sleep((self._factor - 1.0) * (time.monotonic() - asked))
            writer.write(piece[:left])
            self.sent += len(piece[:left])
            await writer.drain()
            asked = time.monotonic()
            if fault is not None and left is not None:
                left -= len(piece)
                if left <= 0:
                    await self._act(fault)
                    return False
        return bool(answer.header("Content-Length")) and answer.header("Connection").lower() != "close"

    async def _act(self, fault: Fault) -> None:
        if fault.action is not None:
            await self._loop.run_in_executor(None, fault.action)

    def _fault_of(self, request: Head) -> Fault | None:
        for fault in self._faults:
            if fault.matches(request) and self._random.random() < fault.chance:
                fault.hits += 1
                return fault
        return None

    def _call(self, coroutine: Coroutine[Any, Any, asyncio.Server]) -> "Future[asyncio.Server]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


async def _send(request: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send a request to the server."""
    writer.write(request.raw)
    async for piece in body(request, reader):
        writer.write(piece)
        await writer.drain()
