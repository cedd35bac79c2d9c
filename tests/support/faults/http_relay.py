"""HTTP/1.1 messages that a proxy relays byte for byte: their heads, and the lengths of their bodies."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

CHUNK = 1 << 16
BODILESS = (204, 304)


@dataclass(frozen=True)
class Head:
    """The first line and the headers of a message, as they were received."""

    raw: bytes

    @property
    def words(self) -> list[str]:
        """The three parts of the first line."""
        return self.raw.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)

    @property
    def is_answer(self) -> bool:
        """True for an answer, False for a request."""
        return self.raw.startswith(b"HTTP/")

    @property
    def method(self) -> str:
        """The method of a request."""
        return self.words[0]

    @property
    def key(self) -> str:
        """The path of a request without its bucket."""
        return unquote(urlsplit(self.words[1]).path).lstrip("/").partition("/")[2]

    @property
    def query(self) -> str:
        """The query of a request."""
        return urlsplit(self.words[1]).query

    @property
    def status(self) -> int:
        """The status of an answer."""
        return int(self.words[1])

    def header(self, name: str) -> str:
        """Return the value of a header; empty if there is none."""
        for line in self.raw.split(b"\r\n")[1:]:
            found, _, value = line.decode("latin-1").partition(":")
            if found.lower() == name.lower():
                return value.strip()
        return ""


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """Read the head of the next message; None if the connection was closed before it."""
    try:
        return Head(await reader.readuntil(b"\r\n\r\n"))
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None


async def body(head: Head, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the bytes of the body that belongs to `head`, with the framing of its chunks."""
    if head.header("Transfer-Encoding").lower() == "chunked":
        async for piece in _chunked(reader):
            yield piece
        return
    length = head.header("Content-Length")
    if not length and head.is_answer:  # the end of the connection is the end of the body
        while piece := await reader.read(CHUNK):
            yield piece
        return
    async for piece in _exactly(int(length or 0), reader):
        yield piece


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        line = await reader.readuntil(b"\r\n")
        yield line
        size = int(line.split(b";")[0], 16)
        async for piece in _exactly(size + 2 if size else 0, reader):
            yield piece
        if not size:
            break
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":  # trailers
        yield line
    yield line


async def _exactly(size: int, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size > 0:
        piece = await reader.read(min(size, CHUNK))
        if not piece:
            raise EOFError
        size -= len(piece)
        yield piece
