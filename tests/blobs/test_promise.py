"""Servers without conditional puts: refused by default, or used with the weak promise and a warning."""

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
    for strict in (settings(endpoint, "strict"), StoreSettings(uri=f"s3://{BUCKET}/weak", endpoint=endpoint)):
        advice = r"use a server that supports If-None-Match .* or a folder, or accept this with store\.promise=weak"
        with pytest.raises(NoConditionalPut, match=f"{words}, so two attempts could both commit: {advice}") as caught:
            open_checked_store(strict)
        assert "\n" not in str(caught.value)


def test_the_weak_promise_warns_and_refuses_existing_keys(weak_server: tuple[str, str]) -> None:
    endpoint, words = weak_server
    store, warning = open_checked_store(settings(endpoint, "weak"))
    assert warning is not None
    assert "\n" not in warning
    assert words.replace("\\", "") in warning
    assert "(store.promise: weak): a commit only checks first whether another one exists" in warning
    assert list(store.list()) == []
    for each in (store, pickle.loads(pickle.dumps(store))):  # a worker receives the store pickled
        each.put_if_absent("key", b"first")
        with pytest.raises(BlobExists, match="weak/key exists already"):
            each.put_if_absent("key", b"second")
        assert each.get("key") == b"first"
        each.delete("key")


def test_the_weak_promise_lets_racing_writers_both_succeed(
    weak_server: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = open_checked_store(settings(weak_server[0], "weak"))
    checked = threading.Barrier(2)
    original = type(store).exists

    def check_together(self: object, key: str) -> bool:
        exists = original(self, key)
        checked.wait(timeout=30)
        return exists

    monkeypatch.setattr(type(store), "exists", check_together)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda data: store.put_if_absent("raced", data), [b"one", b"other"]))  # neither raises
    assert store.get("raced") in (b"one", b"other")
    store.delete("raced")


def test_a_server_with_conditional_puts_keeps_the_strict_promise(
    moto_endpoint: str, credentials: Callable[[str, str], None]
) -> None:
    credentials("any", "any")
    store, warning = open_checked_store(settings(moto_endpoint, "weak"))
    assert warning is None
    assert pickle.dumps(store) == pickle.dumps(open_store(f"s3://{BUCKET}/weak", moto_endpoint))
