"""A proxy in front of an S3 server, that can misbehave: refuse with 503, or be many times slower.

Bytes pass unchanged, the Host header too, so signed requests stay valid.
"""

import asyncio
import contextlib
import threading
import time
from concurrent.futures import Future

REFUSAL = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
CHUNK = 1 << 16


class FlakyProxy:
    """Listens on a port of its own on 127.0.0.1 and passes on to `port`, once it has been set."""

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
        """For clients."""
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def refuse(self) -> None:
        """Answer 503 to every request from now on."""
        self._refusing = True
        self._drop()

    def slow_down(self, factor: float) -> None:
        """Hold every answer until it has taken `factor` times as long as the server needed."""
        self._factor = factor

    def heal(self) -> None:
        """Behave."""
        self._refusing, self._factor = False, 1.0

    def close(self) -> None:
        """Stop listening."""
        self._loop.call_soon_threadsafe(self._server.close)
        self._drop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _drop(self) -> None:
        """Cut all connections: their next requests come anew."""

        def cut() -> None:
            for writer in list(self._open):
                writer.close()

        self._loop.call_soon_threadsafe(cut)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self._refusing:
                self.refused += 1
                await reader.readuntil(b"\r\n\r\n")
                writer.write(REFUSAL)
                await writer.drain()
                return
            onward, back = await asyncio.open_connection("127.0.0.1", self.port)
            self._open.add(back)
            asked = [time.monotonic()]
            await asyncio.gather(self._ask(reader, back, asked), self._answer(onward, writer, asked))
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # the server is away, or the client
        finally:
            for each in (writer, *([back] if "back" in locals() else [])):
                self._open.discard(each)
                each.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[float]) -> None:
        while data := await reader.read(CHUNK):
            asked[0] = time.monotonic()
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[float]) -> None:
        while data := await reader.read(CHUNK):
            await asyncio.sleep((self._factor - 1.0) * (time.monotonic() - asked[0]))
            asked[0] = time.monotonic()
            writer.write(data)
            await writer.drain()
        writer.close()

    def _call(self, coroutine: object) -> "Future[asyncio.Server]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)  # type: ignore[arg-type]
