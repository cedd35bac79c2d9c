"""Unfinished uploads: completed if only an answer was lost, and removed if their writer was killed."""

import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from bam_ray.blobs import BlobStore, s3, s3_uploads
from bam_ray.blobs.folder import PARTIAL, FolderStore
from bam_ray.blobs.memory import MemoryStore
from bam_ray.blobs.s3 import S3Store
from bam_ray.errors import StoreDenied, StoreUnavailable
from bam_ray.units import MIB
from cluster.s3_server import BUCKET
from tests.support.faults.flaky_proxy import Fault, FlakyProxy

DAY = timedelta(days=1)


@pytest.fixture
def flaky(fault_proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setattr(s3_uploads, "PART_BYTES", 5 * MIB)
    monkeypatch.setattr(s3, "TRANSFER", s3.TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB))
    return S3Store(BUCKET, f"leftovers-{os.urandom(4).hex()}", fault_proxy.endpoint)


def put_file(store: BlobStore, folder: Path, data: bytes) -> None:
    (folder / "file").write_bytes(data)
    store.put_file("key", folder / "file")


def put_stream(store: BlobStore, folder: Path, data: bytes) -> None:
    store.put_stream("key", iter([data]))


UPLOADS = pytest.mark.parametrize("upload", [put_file, put_stream])
Upload = Callable[[BlobStore, Path, bytes], None]


@UPLOADS
@pytest.mark.parametrize("lost", ["uploads", "partNumber=2", "uploadId"], ids=["creation", "part", "completion"])
def test_a_lost_answer_does_not_fail_an_upload(
    upload: Upload, lost: str, flaky: S3Store, fault_proxy: FlakyProxy, tmp_path: Path
) -> None:
    data = os.urandom(11 * MIB)
    method = "PUT" if lost.startswith("part") else "POST"
    fault = fault_proxy.add(Fault.lost_answer(method, header=f"[?&]{lost}", times=2))
    upload(flaky, tmp_path, data)
    assert fault.hits == 2
    assert flaky.get("key") == data


@UPLOADS
def test_a_repeated_completion_may_find_no_upload(
    upload: Upload, flaky: S3Store, fault_proxy: FlakyProxy, tmp_path: Path
) -> None:
    data = os.urandom(11 * MIB)
    lost = fault_proxy.add(Fault.lost_answer("POST", header="[?&]uploadId=", times=1))
    gone = fault_proxy.add(Fault("answer", "POST", header="[?&]uploadId=", status=404, code="NoSuchUpload"))
    upload(flaky, tmp_path, data)
    assert (lost.hits, gone.hits) == (1, 1)
    assert flaky.get("key") == data


@UPLOADS
@pytest.mark.parametrize(("status", "code", "error"), [(403, "AccessDenied", StoreDenied), (503, "SlowDown", None)])
def test_a_failed_upload_is_aborted(
    upload: Upload,
    status: int,
    code: str,
    error: type[Exception] | None,
    flaky: S3Store,
    fault_proxy: FlakyProxy,
    tmp_path: Path,
) -> None:
    fault_proxy.add(Fault("answer", "PUT", header="partNumber=2", status=status, code=code))
    with pytest.raises(error or StoreUnavailable, match=code):
        upload(flaky, tmp_path, bytes(11 * MIB))
    assert list(flaky.abort_uploads("", timedelta(0))) == []
    assert not flaky.exists("key")


def leave_unfinished(store: BlobStore, key: str) -> None:
    """Leave what a writer leaves that is killed while it writes `key`."""
    if isinstance(store, S3Store):
        prefix = store.uri.removeprefix(f"s3://{BUCKET}/")
        store.client.create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/{key}")
    elif isinstance(store, FolderStore):
        path = Path(store.uri, key).with_name(f"{PARTIAL}{os.urandom(4).hex()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")


def test_unfinished_uploads_below_a_prefix_are_removed(store: BlobStore, request: pytest.FixtureRequest) -> None:
    for key in ("branches/a/model", "branches/a/steps/1/model", "branches/b/model"):
        leave_unfinished(store, key)
    store.put("branches/a/complete", b"data")
    left = 0 if isinstance(store, MemoryStore) else 1
    if request.node.callspec.params["store"] != "moto":  # it dates all uploads to 2010
        assert list(store.abort_uploads("", DAY)) == []
    assert len(store.abort_uploads("branches/a/", timedelta(0))) == 2 * left
    assert len(store.abort_uploads("", timedelta(0))) == left
    assert list(store.abort_uploads("", timedelta(0))) == []
    assert list(store.list()) == ["branches/a/complete"]


class ListingClient:
    """An S3 client without a server, with uploads of several ages by a clock that is not that of this machine."""

    def __init__(self) -> None:
        self.aborted: list[str] = []

    def get_paginator(self, name: str) -> "ListingClient":
        assert name == "list_multipart_uploads"
        return self

    def paginate(self, **request: Any) -> Iterator[dict[str, Any]]:
        assert request == {"Bucket": BUCKET, "Prefix": "run/branches/"}
        now = datetime(2020, 1, 10, 12, tzinfo=UTC)
        for hours in ((1, 25), (23, 48)):
            uploads = [
                {"Key": f"run/branches/{age}", "UploadId": f"id {age}", "Initiated": now - timedelta(hours=age)}
                for age in hours
            ]
            headers = {"date": "Fri, 10 Jan 2020 12:00:00 GMT"}
            yield {"Uploads": uploads, "ResponseMetadata": {"HTTPHeaders": headers}}
        yield {"ResponseMetadata": {"HTTPHeaders": headers}}

    def abort_multipart_upload(self, **request: Any) -> None:
        self.aborted.append(request["UploadId"])
        if request["UploadId"] == "id 48":
            raise ClientError({"Error": {"Code": "NoSuchUpload"}}, "AbortMultipartUpload")


def test_the_age_of_an_upload_is_that_of_the_server() -> None:
    client = ListingClient()
    assert list(S3Store(BUCKET, "run", client=client).abort_uploads("branches/", DAY)) == ["branches/25"]
    assert client.aborted == ["id 25", "id 48"]


def test_the_age_of_a_temporary_file_is_that_of_its_last_write(tmp_path: Path) -> None:
    for name, age in (("old", 25), ("new", 23)):
        (tmp_path / f"{PARTIAL}{name}").write_bytes(b"half")
        os.utime(tmp_path / f"{PARTIAL}{name}", times=(0, time.time() - age * 3600))
    assert list(FolderStore(tmp_path).abort_uploads("", DAY)) == [f"{PARTIAL}old"]
    assert [path.name for path in tmp_path.iterdir()] == [f"{PARTIAL}new"]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the paths of everything that is flushed to disk."""
    paths: list[Path] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        paths.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return paths


def test_names_are_flushed_to_disk(tmp_path: Path, synced: list[Path]) -> None:
    store = FolderStore(tmp_path / "store")
    store.put("a/b/key", b"data")
    assert [path for path in synced if path.is_dir()] == [
        tmp_path,
        tmp_path / "store",
        tmp_path / "store" / "a",
        tmp_path / "store" / "a" / "b",
    ]
    for write in (store.put_if_absent, store.put):
        synced.clear()
        write("a/other", b"data")
        assert synced[-1] == tmp_path / "store" / "a"
        assert synced[0].name.startswith(PARTIAL)


def test_a_network_file_system_may_not_flush_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir():
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    FolderStore(tmp_path).put("a/key", b"data")
    assert FolderStore(tmp_path).get("a/key") == b"data"


def test_console_folders_are_not_listed(flaky: S3Store) -> None:
    prefix = flaky.uri.removeprefix(f"s3://{BUCKET}/")
    flaky.put("text/a.jsonl", b"{}")
    for key in ("", "text/", "text/empty/"):
        flaky.client.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=b"")
    assert list(flaky.list()) == ["text/a.jsonl"]
    assert list(flaky.list("text/")) == ["text/a.jsonl"]


def test_names_that_are_not_text_are_sorted_by_their_bytes(tmp_path: Path) -> None:
    names = [b"z", b"\x80", b"\xff", "\ue000".encode(), "😀".encode()]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"")
    assert [os.fsencode(key) for key in FolderStore(tmp_path).list()] == sorted(names)
