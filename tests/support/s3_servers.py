"""Fixtures, a plugin of pytest: S3 servers that run in this process."""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from moto.server import ThreadedMotoServer

from cluster.s3_server import BUCKET
from tests.support.faults.flaky_proxy import FlakyProxy

# How servers without conditional puts behave, with patterns of the warnings about them
KINDS = {
    "overwrites": "silently overwrites on a conditional put",
    "refuses": r"has no conditional puts \(NotImplemented\)",
    "looks first": "has conditional puts that are not atomic",
}
NOT_IMPLEMENTED = b"<Error><Code>NotImplemented</Code><Message>If-None-Match</Message></Error>"
FAILED = b"<Error><Code>PreconditionFailed</Code><Message>It exists.</Message></Error>"


@pytest.fixture(scope="session")
def moto_client() -> Iterator[Any]:
    """Start moto's S3 server, which is fast but accepts any credentials, in a thread; return a client of it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        aws_access_key_id="any",
        aws_secret_access_key="any",
        region_name="us-east-1",
    )
    server.stop()


@pytest.fixture
def moto_endpoint(moto_client: Any) -> str:
    """Return the endpoint of moto's S3 server, which has the bucket of the tests."""
    moto_client.create_bucket(Bucket=BUCKET)  # `mock_aws` of another test deletes everything in the process
    endpoint: str = moto_client.meta.endpoint_url
    return endpoint


@pytest.fixture
def fault_proxy(moto_endpoint: str, credentials: Callable[[str, str], None]) -> Iterator[FlakyProxy]:
    """Yield a proxy in front of moto's S3 server, which forwards everything until a test adds faults."""
    credentials("any", "any")
    port = urlsplit(moto_endpoint).port
    assert port is not None
    proxy = FlakyProxy(port)
    yield proxy
    proxy.close()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that sets the access key and the secret key that S3 stores use."""

    def use(access_key: str, secret_key: str) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)

    return use


def proxy(endpoint: str, kind: str) -> ThreadingHTTPServer:
    """Return a proxy of an S3 server with conditional puts of a kind of `KINDS`."""
    host, port = urlsplit(endpoint).hostname, urlsplit(endpoint).port

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            conditional = self.headers.get("If-None-Match") is not None
            del self.headers["If-None-Match"]
            if conditional and kind == "refuses":
                self.answer(501, {"Content-Type": "application/xml"}, NOT_IMPLEMENTED)
                return
            if conditional and kind == "looks first":
                if self.ask("HEAD", dict(self.headers) | {"Content-Length": "0"})[0] == 200:
                    self.answer(412, {"Content-Type": "application/xml"}, FAILED)
                    return
                time.sleep(0.05)
            self.answer(*self.ask(self.command, dict(self.headers), body))

        def ask(self, method: str, headers: dict[str, str], body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(host or "", port, timeout=30)
            connection.request(method, self.path, body, headers)
            response = connection.getresponse()
            answer = response.status, dict(response.getheaders()), response.read()
            connection.close()
            return answer

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            is_head = self.command == "HEAD"
            self.send_header("Content-Length", headers.get("Content-Length", "0") if is_head else str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if is_head else body)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward

        def log_message(self, format: str, *args: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture(params=KINDS)
def weak_server(
    request: pytest.FixtureRequest, moto_endpoint: str, credentials: Callable[[str, str], None]
) -> Iterator[tuple[str, str]]:
    """Start a server without conditional puts; return its endpoint and a pattern of the warning about it."""
    credentials("any", "any")
    server = proxy(moto_endpoint, request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", KINDS[request.param]
    server.shutdown()
    server.server_close()
