"""Every refusal of an S3 server becomes an error of the right class, which quotes the server and names a remedy."""

import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bam_ray.blobs.check import check_put_if_absent
from bam_ray.blobs.s3 import S3Store
from bam_ray.errors import StoreDenied, StoreError, StoreUnavailable
from bam_ray.units import MIB
from cluster.s3_server import BUCKET
from tests.support.faults.credential_server import CredentialServer
from tests.support.faults.flaky_proxy import Fault, FlakyProxy

SKEWED = "<Message>The difference is too large.</Message><ServerTime>2026-11-30T08:00:00Z</ServerTime>"
MALFORMED = "<Message>the region 'us-east-1' is wrong</Message><Region>eu-west-9</Region>"
CHECKSUM_HEADERS = "x-amz-(sdk-)?checksum|x-amz-trailer|content-encoding: aws-chunked"


@pytest.fixture
def s3(fault_proxy: FlakyProxy) -> S3Store:
    return S3Store(BUCKET, f"answers-{os.urandom(4).hex()}", fault_proxy.endpoint)


def reads_and_writes(store: S3Store, path: Path) -> list[Callable[[], object]]:
    (path / "sent").write_bytes(b"data")
    return [
        lambda: store.get("key"),
        lambda: store.get_range("key", 0, 1),
        lambda: store.get_file("key", path / "received"),
        lambda: store.size("key"),
        lambda: store.exists("key"),
        lambda: list(store.list()),
        lambda: store.put("key", b""),
        lambda: store.put_if_absent("key", b""),
        lambda: store.put_file("key", path / "sent"),
        lambda: store.put_stream("key", iter([bytes(9 * MIB)])),
        lambda: store.delete("key"),
    ]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((403, "AccessDenied", "<Message>Deny.</Message>"), StoreDenied, "AccessDenied, Deny.*allow s3:GetObject"),
        ((400, "ExpiredToken", "<Message>Too old.</Message>"), StoreDenied, "Too old.*AWS_SESSION_TOKEN"),
        ((400, "InvalidToken", "<Message>Malformed.</Message>"), StoreDenied, "Malformed.*AWS_SESSION_TOKEN"),
        ((400, "TokenRefreshRequired", ""), StoreDenied, "TokenRefreshRequired.*AWS_SESSION_TOKEN"),
        ((403, "InvalidAccessKeyId", ""), StoreDenied, "InvalidAccessKeyId.*correct AWS_ACCESS_KEY_ID"),
        ((403, "SignatureDoesNotMatch", ""), StoreDenied, "SignatureDoesNotMatch.*correct AWS_ACCESS_KEY_ID"),
        ((403, "RequestTimeTooSkewed", SKEWED), StoreDenied, "time 2026-11-30T08:00:00Z.*set this machine's clock"),
        ((400, "AuthorizationHeaderMalformed", MALFORMED), StoreDenied, "its region eu-west-9.*AWS_REGION"),
        ((507, "QuotaExceeded", "<Message>Full.</Message>"), StoreUnavailable, "QuotaExceeded, Full"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_answers_have_one_class_and_say_what_to_do(
    s3: S3Store,
    fault_proxy: FlakyProxy,
    tmp_path: Path,
    answer: tuple[int, str, str],
    error: type[StoreError],
    words: str,
) -> None:
    s3.put("key", b"data")
    status, code, details = answer
    fault_proxy.add(Fault("answer", status=status, code=code, details=details))
    for operation in reads_and_writes(s3, tmp_path):
        with pytest.raises(error, match=words) as caught:
            operation()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code"), [(400, "InvalidArgument"), (501, "NotImplemented"), (403, "SignatureDoesNotMatch")]
)
def test_rejected_checksums_are_left_out(fault_proxy: FlakyProxy, tmp_path: Path, status: int, code: str) -> None:
    rejection = fault_proxy.add(Fault("answer", header=CHECKSUM_HEADERS, status=status, code=code))
    for number in range(6, 10):  # the operations that write
        store = S3Store(BUCKET, f"{code}-{number}", fault_proxy.endpoint)
        hits = rejection.hits
        reads_and_writes(store, tmp_path)[number]()
        assert rejection.hits > hits
        assert store.get("key") in (b"", b"data", bytes(9 * MIB))
        hits = rejection.hits
        store.put("again", b"later writes send none")
        assert rejection.hits == hits
    check_put_if_absent(S3Store(BUCKET, code, fault_proxy.endpoint))


@pytest.mark.parametrize("code", ["BadDigest", "RequestTimeout"])
def test_checksums_stay_on_after_damage_and_delays(fault_proxy: FlakyProxy, s3: S3Store, code: str) -> None:
    damaged = fault_proxy.add(Fault("answer", "PUT", header=CHECKSUM_HEADERS, status=400, code=code))
    with pytest.raises(StoreUnavailable, match=code):
        s3.put("key", b"")
    hits = damaged.hits
    with pytest.raises(StoreUnavailable, match=code):
        s3.put("key", b"")
    assert damaged.hits == 2 * hits


def test_checksums_are_not_blamed_for_other_answers(fault_proxy: FlakyProxy, s3: S3Store) -> None:
    fault_proxy.add(Fault("answer", "PUT", status=400, code="InvalidStorageClass", details="<Message>No.</Message>"))
    with pytest.raises(StoreUnavailable, match="InvalidStorageClass, No; if it rejects checksums: set AWS_REQUEST_"):
        s3.put("key", b"")
    fault_proxy.recover()
    with_checksums = fault_proxy.add(Fault("answer", "PUT", header=CHECKSUM_HEADERS, status=503, times=1))
    s3.put("key", b"")
    assert with_checksums.hits == 1


@pytest.mark.parametrize("refusals", [3, 4])
def test_a_busy_metadata_server_is_asked_again(
    fault_proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with CredentialServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.refusals = refusals
        S3Store(BUCKET, "role", fault_proxy.endpoint).put("key", b"")
        assert server.refused == refusals


def test_credentials_that_appear_later_are_found(fault_proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with CredentialServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.refusals = 1000
        store = S3Store(BUCKET, "role", fault_proxy.endpoint)
        with pytest.raises(StoreDenied, match=r"no credentials for s3://.* or give this machine a role"):
            store.put("key", b"")
        server.refusals = 0
        store.put("key", b"")


def test_renewed_keys_are_used_after_the_old_have_expired(
    fault_proxy: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3Store
) -> None:
    s3.put("key", b"")
    fault_proxy.add(Fault("answer", header="Credential=any/", status=400, code="ExpiredToken"))
    with pytest.raises(StoreDenied, match="ExpiredToken"):
        s3.get("key")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
    assert s3.get("key") == b""


@pytest.mark.parametrize("names", [["AWS_REGION"], ["AWS_DEFAULT_REGION"], ["AWS_DEFAULT_REGION", "AWS_REGION"]])
def test_requests_are_signed_for_the_region_of_the_environment(
    fault_proxy: FlakyProxy, s3: S3Store, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    regions = iter(["ap-northeast-1", "another"])
    for name in names:
        monkeypatch.setenv(name, next(regions))
    signed = "/ap-northeast-1/s3/aws4_request"
    fault_proxy.add(Fault("answer", header=f"(?s)^(?!.*{signed})", status=400, code="AuthorizationHeaderMalformed"))
    signed_for = fault_proxy.add(Fault("answer", header=signed, status=403, code="AccessDenied"))
    with pytest.raises(StoreDenied, match="AccessDenied"):
        s3.get("key")
    assert signed_for.hits == 1


class RedirectingServer(BaseHTTPRequestHandler):
    """A web server in front of a store, which redirects from http to https."""

    def answer(self) -> None:
        self.send_response(301)
        self.send_header("Location", f"https://store.example{self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def redirecting_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), RedirectingServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_redirecting_server_is_named(
    redirecting_server: str, tmp_path: Path, credentials: Callable[[str, str], None]
) -> None:
    credentials("any", "any")
    store = S3Store(BUCKET, "x", redirecting_server)
    for operation in reads_and_writes(store, tmp_path):
        with pytest.raises(StoreUnavailable, match=r"redirects to https://store\.example/.*: write store\.endpoint"):
            operation()
