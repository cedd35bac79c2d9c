"""Streamed uploads to S3 with a recording client: memory in use, and the reaction to a refused part."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from bam_ray.blobs import s3, s3_uploads
from bam_ray.blobs.s3 import CONCURRENT_PARTS, S3Store
from bam_ray.blobs.s3_uploads import rechunk
from bam_ray.errors import StoreError, StoreUnavailable

PART_BYTES = 1000


class RecordingClient:
    """An S3 client without a server, which refuses the part `refused` with SlowDown (503)."""

    def __init__(self, refused: int | None = None) -> None:
        self.calls: list[str] = []
        self.parts: dict[int, bytes] = {}
        self.completed: list[int] = []
        self._refused = refused
        self._lock = threading.Lock()

    def create_multipart_upload(self, **_: Any) -> dict[str, str]:
        self.calls.append("create")
        return {"UploadId": "upload"}

    def upload_part(self, **request: Any) -> dict[str, str]:
        number = request["PartNumber"]
        time.sleep(0.002)
        if number == self._refused:
            raise ClientError({"Error": {"Code": "SlowDown"}}, "UploadPart")
        with self._lock:
            self.parts[number] = bytes(request["Body"])
        return {"ETag": f"tag {number}", "ChecksumCRC32": f"sum {number}"}

    def put_object(self, **_: Any) -> None:
        self.calls.append("put")

    def complete_multipart_upload(self, **request: Any) -> None:
        self.calls.append("complete")
        parts = request["MultipartUpload"]["Parts"]
        for part in parts:
            number = part["PartNumber"]
            assert part == {"PartNumber": number, "ETag": f"tag {number}", "ChecksumCRC32": f"sum {number}"}
        self.completed = [part["PartNumber"] for part in parts]

    def abort_multipart_upload(self, **request: Any) -> None:
        assert request["UploadId"] == "upload"
        self.calls.append("abort")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_uploads, "PART_BYTES", PART_BYTES)


def test_parts_keep_their_order_and_memory_is_bounded() -> None:
    client = RecordingClient()
    produced = held = 0

    def chunks() -> Iterator[bytes]:
        nonlocal produced, held
        for number in range(500):
            held = max(held, produced - sum(map(len, list(client.parts.values()))))
            chunk = bytes([number % 256]) * 137
            produced += len(chunk)
            yield chunk

    S3Store("bucket", "", client=client).put_stream("key", chunks())
    assert client.calls == ["create", "complete"]
    assert client.completed == list(range(1, produced // PART_BYTES + 2))
    assert b"".join(client.parts[number] for number in client.completed) == b"".join(
        bytes([number % 256]) * 137 for number in range(500)
    )
    assert held <= (CONCURRENT_PARTS + 1) * PART_BYTES + 137


def test_a_refused_part_aborts_the_upload() -> None:
    client = RecordingClient(refused=3)
    produced = 0

    def chunks() -> Iterator[bytes]:
        nonlocal produced
        for _ in range(1000):
            produced += 1
            yield bytes(PART_BYTES)

    with pytest.raises(StoreUnavailable, match="key: the S3 server answered SlowDown"):
        S3Store("bucket", "", client=client).put_stream("key", chunks())
    assert client.calls == ["create", "abort"]
    assert produced <= 3 + 2 * CONCURRENT_PARTS


def test_rechunk_makes_equal_parts_of_any_chunks() -> None:
    numbers = memoryview(bytearray(range(24))).cast("B", (4, 6))
    parts = list(rechunk(iter([b"", numbers, b"ab", memoryview(b""), bytes(20)]), 10))
    assert [len(part) for part in parts] == [10, 10, 10, 10, 6]
    assert b"".join(parts) == bytes(range(24)) + b"ab" + bytes(20)
    assert list(rechunk(iter([]), 10)) == []


@pytest.mark.parametrize(("size", "parts"), [(None, 20), (20 * PART_BYTES, 20), (10_000 * PART_BYTES + 1, 1)])
def test_the_size_of_parts_follows_the_announced_size(size: int | None, parts: int) -> None:
    client = RecordingClient()
    S3Store("bucket", "", client=client).put_stream("key", iter([bytes(20 * PART_BYTES)]), size)
    assert len(client.completed or [1]) == parts


def test_part_sizes_keep_the_limits_of_s3() -> None:
    for gib in (1, 77, 79, 500, 5 * 1024, 48_000):
        length = s3_uploads.part_bytes("uri", gib << 30)
        assert (gib << 30) / length <= s3_uploads.MAX_PARTS
        assert length <= s3_uploads.MAX_PART_BYTES


def test_a_stream_that_cannot_fit_fails_before_it_is_sent() -> None:
    client = RecordingClient()

    def chunks() -> Iterator[bytes]:
        raise AssertionError("the stream was read")
        yield b""

    with pytest.raises(StoreError, match=r"bucket/key would have .* write it in several blobs"):
        S3Store("bucket", "", client=client).put_stream("key", chunks(), 50_001 << 30)
    assert client.calls == []


def test_a_stream_of_unknown_size_that_is_too_long_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "MAX_PARTS", 3)
    client = RecordingClient()
    with pytest.raises(StoreError, match=r"more than 3 parts .*give put_stream the size"):
        S3Store("bucket", "", client=client).put_stream("key", iter([bytes(5 * PART_BYTES)]))
    assert client.calls == ["create", "abort"]
