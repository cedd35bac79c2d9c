"""Reads whose bodies are cut: they continue from the byte that was reached, and never mix two versions of a blob."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import FlexibleChecksumError
from botocore.response import StreamingBody

from bam_ray.blobs import s3_reading
from bam_ray.blobs.s3 import S3Store
from bam_ray.errors import BlobNotFound, StoreError, StoreUnavailable
from bam_ray.units import MIB
from cluster.s3_server import BUCKET
from tests.support.faults.flaky_proxy import Fault, FlakyProxy

SIZE = 5 * MIB + 3


@pytest.fixture
def s3(fault_proxy: FlakyProxy) -> S3Store:
    return S3Store(BUCKET, f"cut-{os.urandom(4).hex()}", fault_proxy.endpoint)


def get(store: S3Store, path: Path) -> bytes:
    return store.get("key")


def get_range(store: S3Store, path: Path) -> bytes:
    return store.get_range("key", 0, SIZE + 100)


def get_file(store: S3Store, path: Path) -> bytes:
    store.get_file("key", path / "file")
    return (path / "file").read_bytes()


READS = pytest.mark.parametrize("read", [get, get_range, get_file])


@READS
def test_a_cut_body_is_continued(
    read: Callable[[S3Store, Path], bytes],
    s3: S3Store,
    fault_proxy: FlakyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_reading, "RANGE_BYTES", 3 * MIB)
    data = os.urandom(SIZE)
    s3.put("key", data)
    cut = fault_proxy.add(Fault.cut_body(key="/key$", times=6))  # more cuts than a request has tries
    assert read(s3, tmp_path) == data
    assert cut.hits == 6
    assert fault_proxy.sent < 1.5 * SIZE + 6 * MIB


@READS
def test_bodies_that_never_arrive_are_unavailable(
    read: Callable[[S3Store, Path], bytes], s3: S3Store, fault_proxy: FlakyProxy, tmp_path: Path
) -> None:
    s3.put("key", os.urandom(MIB))
    cut = fault_proxy.add(Fault.cut_body(after=0, key="/key$"))
    with pytest.raises(StoreUnavailable, match="key: the S3 server sent a damaged or incomplete body"):
        read(s3, tmp_path)
    assert cut.hits >= s3_reading.TRIES
    assert not (tmp_path / "file").exists()


@READS
def test_two_versions_are_never_mixed(
    read: Callable[[S3Store, Path], bytes],
    s3: S3Store,
    fault_proxy: FlakyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_reading, "RANGE_BYTES", 3 * MIB)
    old, new = b"o" * SIZE, b"n" * SIZE
    s3.put("key", old)
    cut = fault_proxy.add(Fault.cut_body(key="/key$", times=1))
    cut.action = lambda: s3.put("key", new)
    assert read(s3, tmp_path) == new
    assert cut.hits == 1


def test_a_blob_deleted_while_it_is_read_is_not_found(s3: S3Store, fault_proxy: FlakyProxy) -> None:
    s3.put("key", bytes(MIB))
    fault_proxy.add(Fault.cut_body(key="/key$", times=1)).action = lambda: s3.delete("key")
    with pytest.raises(BlobNotFound, match="key does not exist"):
        s3.get("key")


class DamagedBody:
    """A body that does not match the checksum of its answer."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def iter_chunks(self, size: int) -> Iterator[bytes]:
        yield self._data
        raise FlexibleChecksumError(error_msg="Expected checksum x did not match calculated checksum: y")

    def close(self) -> None:
        pass


class OddClient:
    """An S3 client without a server: its answers have other bytes than they promise."""

    def __init__(self, damaged: int = 0, ignores_ranges: bool = False) -> None:
        self._damaged = damaged
        self._ignores_ranges = ignores_ranges

    def get_object(self, Range: str = "", **_: Any) -> dict[str, Any]:  # noqa: N803
        data = b"0123456789"
        answer = {"ETag": "tag", "ContentLength": len(data)}
        if Range and not self._ignores_ranges:
            answer["ContentRange"] = f"bytes 0-9/{len(data)}"
        self._damaged -= 1
        body = StreamingBody(io.BytesIO(data), len(data))
        return answer | {"Body": DamagedBody(b"x" * len(data)) if self._damaged >= 0 else body}


def test_a_body_with_a_wrong_checksum_is_read_again() -> None:
    assert S3Store(BUCKET, "", client=OddClient(damaged=2)).get("key") == b"0123456789"
    with pytest.raises(StoreUnavailable, match=r"damaged or incomplete body .*checksum"):
        S3Store(BUCKET, "", client=OddClient(damaged=1000)).get("key")


def test_a_server_that_ignores_ranges_is_refused() -> None:
    with pytest.raises(StoreError, match="ignores the range of a request for key"):
        S3Store(BUCKET, "", client=OddClient(ignores_ranges=True)).get_range("key", 3, 2)


class ReplacedBlob:
    """An S3 client without a server, which ignores conditions: the body of the first of two versions is cut."""

    def __init__(self) -> None:
        self.conditions: list[str | None] = []

    def get_object(self, **request: Any) -> dict[str, Any]:
        self.conditions.append(request.get("IfMatch"))
        first = len(self.conditions) == 1
        data = b"o" * MIB if first else b"n" * 2 * MIB
        start = int(request.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        body = data[start : MIB // 2] if first else data[start:]
        return {
            "ETag": "old" if first else "new",
            "ContentLength": len(data) - start,
            "ContentRange": f"bytes {start}-{len(data) - 1}/{len(data)}",
            "Body": StreamingBody(io.BytesIO(body), len(data) - start),
        }


def test_a_server_that_ignores_conditions_mixes_no_versions() -> None:
    client = ReplacedBlob()
    assert S3Store(BUCKET, "", client=client).get("key") == b"n" * 2 * MIB
    assert client.conditions == [None, "old", None]
