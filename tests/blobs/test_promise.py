"""Servers that have no conditional puts: refused, or used under a weaker promise that is said."""

import http.client
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from bam_ray.blobs import open_store
from bam_ray.blobs.check import open_checked_store
from bam_ray.errors import BlobExists, NoConditionalPut
from bam_ray.settings import StoreSettings
from cluster.s3_server import BUCKET

KINDS = {
    "overwrites": "silently overwrites on a conditional put",
    "refuses": r"has no conditional puts \(NotImplemented\)",
}
NOT_IMPLEMENTED = b"<Error><Code>NotImplemented</Code><Message>If-None-Match</Message></Error>"


def proxy(behind: str, overwrites: bool) -> ThreadingHTTPServer:
    """A server before another one: without the condition of a put, or refusing those that have one, as some do."""
    host, port = urlsplit(behind).hostname, urlsplit(behind).port

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            conditional = self.headers.get("If-None-Match") is not None
            del self.headers["If-None-Match"]
            if conditional and not overwrites:
                self.answer(501, {"Content-Type": "application/xml"}, NOT_IMPLEMENTED)
                return
            connection = http.client.HTTPConnection(host or "", port, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            self.answer(response.status, dict(response.getheaders()), response.read())
            connection.close()

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            is_head = self.command == "HEAD"
            self.send_header("Content-Length", headers.get("Content-Length", "0") if is_head else str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if is_head else body)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = pass_on

        def log_message(self, format: str, *args: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture(params=KINDS)
def weak_server(
    request: pytest.FixtureRequest, moto_endpoint: str, credentials: Callable[[str, str], None]
) -> Iterator[tuple[str, str]]:
    """Its endpoint, and what is to be said of it."""
    credentials("any", "any")
    server = proxy(moto_endpoint, overwrites=request.param == "overwrites")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", KINDS[request.param]
    server.shutdown()
    server.server_close()


def settings(endpoint: str, promise: str) -> StoreSettings:
    return StoreSettings.model_validate({"uri": f"s3://{BUCKET}/weak", "endpoint": endpoint, "promise": promise})


def test_a_server_without_conditional_puts_is_refused(weak_server: tuple[str, str]) -> None:
    endpoint, words = weak_server
    for asked in (settings(endpoint, "strict"), StoreSettings(uri=f"s3://{BUCKET}/weak", endpoint=endpoint)):
        mending = r"use a server that supports If-None-Match .* or a folder, or accept this with store\.promise=weak"
        with pytest.raises(NoConditionalPut, match=f"{words}, so two attempts could both commit: {mending}") as caught:
            open_checked_store(asked)
        assert "\n" not in str(caught.value)


def test_a_weaker_promise_is_said_and_kept(weak_server: tuple[str, str]) -> None:
    endpoint, words = weak_server
    store, said = open_checked_store(settings(endpoint, "weak"))
    assert said is not None
    assert "\n" not in said
    assert words.replace("\\", "") in said
    assert "(store.promise: weak): a commit only checks first whether another one exists" in said
    assert list(store.list()) == []
    for store_there in (store, pickle.loads(pickle.dumps(store))):  # as a worker gets it
        store_there.put_if_absent("key", b"first")
        with pytest.raises(BlobExists, match="weak/key exists already"):
            store_there.put_if_absent("key", b"second")
        assert store_there.get("key") == b"first"
        store_there.delete("key")


def test_what_the_weaker_promise_lacks(weak_server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = open_checked_store(settings(weak_server[0], "weak"))
    looked = threading.Barrier(2)
    really = type(store).exists

    def both_look_first(self: object, key: str) -> bool:
        there = really(self, key)
        looked.wait(timeout=30)
        return there

    monkeypatch.setattr(type(store), "exists", both_look_first)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda data: store.put_if_absent("raced", data), [b"one", b"other"]))  # neither is told
    assert store.get("raced") in (b"one", b"other")
    store.delete("raced")


def test_a_weak_promise_asked_of_a_store_that_keeps_the_strict_one(
    moto_endpoint: str, credentials: Callable[[str, str], None]
) -> None:
    credentials("any", "any")
    store, said = open_checked_store(settings(moto_endpoint, "weak"))
    assert said is None
    assert pickle.dumps(store) == pickle.dumps(open_store(f"s3://{BUCKET}/weak", moto_endpoint))
