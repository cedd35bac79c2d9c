"""A proxy in front of an S3 server that can answer 503 or delay its answers.

It forwards all bytes unchanged, also the Host header, so signed requests stay valid.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

REFUSAL = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
CHUNK = 1 << 16


class FlakyProxy:
    """A proxy on a free port of 127.0.0.1, which forwards to `port` on the same host once `port` has been set."""

    def __init__(self) -> None:
        self.port = 0
        self.refused = 0
        self._refusing = False
        self._factor = 1.0
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

    def recover(self) -> None:
        """Forward all requests without a delay again."""
        self._refusing, self._factor = False, 1.0

    def close(self) -> None:
        """Stop the proxy."""
        self._loop.call_soon_threadsafe(self._server.close)
        self._drop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _drop(self) -> None:
        """Close all connections, so that clients open new ones."""

        def close_all() -> None:
            for writer in list(self._open):
                writer.close()

        self._loop.call_soon_threadsafe(close_all)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self._refusing:
                self.refused += 1
                await reader.readuntil(b"\r\n\r\n")
                writer.write(REFUSAL)
                await writer.drain()
                return
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self.port)
            self._open.add(upstream)
            asked = [time.monotonic()]
            await asyncio.gather(
                self._forward_requests(reader, upstream, asked), self._forward_answers(upstream_reader, writer, asked)
            )
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # the server or the client has closed the connection
        finally:
            for each in (writer, *([upstream] if "upstream" in locals() else [])):
                self._open.discard(each)
                each.close()

    async def _forward_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[float]
    ) -> None:
        while data := await reader.read(CHUNK):
            asked[0] = time.monotonic()
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()

    async def _forward_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[float]
    ) -> None:
        while data := await reader.read(CHUNK):
            await asyncio.sleep((self._factor - 1.0) * (time.monotonic() - asked[0]))
            asked[0] = time.monotonic()
            writer.write(data)
            await writer.drain()
        writer.close()

    def _call(self, coroutine: Coroutine[Any, Any, asyncio.Server]) -> "Future[asyncio.Server]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
