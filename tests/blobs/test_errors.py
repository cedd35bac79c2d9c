"""Every failure of a store raises the right error, with a message of one line."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from bam_ray.blobs import BlobStore, open_store
from bam_ray.blobs.check import check_put_if_absent
from bam_ray.blobs.folder import FolderStore
from bam_ray.blobs.memory import MemoryStore
from bam_ray.blobs.s3 import S3Store
from bam_ray.blobs.s3_uploads import PART_BYTES
from bam_ray.errors import BlobExists, NoConditionalPut, SettingsError, StoreDenied, StoreError, StoreUnavailable
from cluster.processes import free_ports
from cluster.s3_server import BUCKET, S3Settings

NOBODY = 65534


def operations(tmp_path: Path) -> dict[str, Callable[[BlobStore], object]]:
    """Return all operations of a store, by name."""
    file = tmp_path / "file"
    file.write_bytes(b"data")
    return {
        "put": lambda store: store.put("key", b""),
        "put_if_absent": lambda store: store.put_if_absent("key", b""),
        "put_file": lambda store: store.put_file("key", file),
        "put_stream": lambda store: store.put_stream("key", iter([bytes(PART_BYTES)])),
        "get": lambda store: store.get("key"),
        "get_range": lambda store: store.get_range("key", 0, 1),
        "get_file": lambda store: store.get_file("key", file),
        "size": lambda store: store.size("key"),
        "exists": lambda store: store.exists("key"),
        "list": lambda store: list(store.list()),
        "delete": lambda store: store.delete("key"),
    }


def assert_all_raise(
    store: BlobStore, error: type[StoreError], tmp_path: Path, words: str, except_for: frozenset[str] = frozenset()
) -> None:
    for name, operation in operations(tmp_path).items():
        if name in except_for:
            continue
        with pytest.raises(error, match=words) as caught:
            operation(store)
        assert "\n" not in str(caught.value), name


@pytest.fixture
def no_permission(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder that this process may not enter; a root process becomes nobody for the test."""
    folder = tmp_path / "private"
    folder.mkdir(mode=0o000)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o700)


def test_a_folder_without_permission_is_denied(no_permission: Path) -> None:
    store = FolderStore(no_permission)
    for operation in (
        lambda: store.put("key", b""),
        lambda: store.put_if_absent("key", b""),
        lambda: store.get("key"),
        lambda: store.size("key"),
        lambda: store.exists("key"),
        lambda: list(store.list()),
        lambda: store.delete("key"),
    ):
        with pytest.raises(StoreDenied, match=r"no permission for .*fix its owner or mode"):
            operation()


def test_a_store_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable, match="folder store"):
        FolderStore(tmp_path / "file" / "store").put("key", b"")


def test_a_file_system_without_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match=r"no hard links, which commits need .*use a folder on another file system"):
        check_put_if_absent(FolderStore(tmp_path))


def test_an_unreachable_server_is_unavailable(tmp_path: Path, credentials: Callable[[str, str], None]) -> None:
    credentials("any", "any")
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(StoreUnavailable, match=f"no S3 server answers at {endpoint} .*start it or correct"):
        S3Store(BUCKET, "", endpoint).get("key")


def test_the_endpoint_of_the_environment_is_used(
    credentials: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials("any", "any")
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreUnavailable, match=endpoint):
        list(S3Store(BUCKET, "").list())


def test_missing_credentials_are_denied(moto_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    store = S3Store(BUCKET, "", moto_endpoint)
    assert_all_raise(store, StoreDenied, tmp_path, "no credentials .*set AWS_ACCESS_KEY_ID")


def test_an_endpoint_that_is_not_a_url_is_refused(credentials: Callable[[str, str], None]) -> None:
    credentials("any", "any")
    with pytest.raises(StoreUnavailable, match=r"write store\.endpoint .* as http://HOST:PORT"):
        S3Store(BUCKET, "", "localhost:8333").get("key")


def test_a_missing_bucket_is_unavailable(
    moto_endpoint: str, tmp_path: Path, credentials: Callable[[str, str], None]
) -> None:
    credentials("any", "any")
    # A HEAD response has no body, so a missing bucket looks like a missing key
    store = S3Store("no-such-bucket", "", moto_endpoint)
    heads = frozenset({"size", "exists", "get_file"})
    assert_all_raise(store, StoreUnavailable, tmp_path, "bucket 'no-such-bucket' does not exist: create it", heads)


@pytest.mark.slow
def test_a_missing_bucket_on_a_real_server_is_unavailable(
    s3_server: S3Settings, tmp_path: Path, credentials: Callable[[str, str], None]
) -> None:
    credentials(s3_server.access_key, s3_server.secret_key)
    store = S3Store("no-such-bucket", "", s3_server.endpoint)
    with pytest.raises(StoreUnavailable, match="bucket 'no-such-bucket' does not exist: create it"):
        check_put_if_absent(store)
    with pytest.raises(StoreUnavailable, match="bucket 'no-such-bucket' does not exist: create it"):
        operations(tmp_path)["put_file"](store)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["access key", "secret"])
def test_wrong_credentials_are_denied(
    s3_server: S3Settings, wrong: str, tmp_path: Path, credentials: Callable[[str, str], None]
) -> None:
    access_key = "AKIAWRONG" if wrong == "access key" else s3_server.access_key
    credentials(access_key, "wrong" if wrong == "secret" else s3_server.secret_key)
    store = S3Store(BUCKET, "", s3_server.endpoint)
    words = "refuses these credentials .*correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    assert_all_raise(store, StoreDenied, tmp_path, words)


class ConflictingClient:
    """An S3 client whose first `conflicts` conditional puts conflict with another put in progress."""

    def __init__(self, conflicts: int) -> None:
        self.conflicts = conflicts
        self.puts = 0

    def put_object(self, **_: Any) -> None:
        self.puts += 1
        if self.puts <= self.conflicts:
            raise ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject")


def test_a_conflicting_put_is_retried() -> None:
    client = ConflictingClient(2)
    S3Store(BUCKET, "", client=client).put_if_absent("key", b"")
    assert client.puts == 3


def test_endless_conflicts_do_not_raise_blob_exists() -> None:
    store = S3Store(BUCKET, "", client=ConflictingClient(1000))
    with pytest.raises(StoreUnavailable, match="ConditionalRequestConflict"):
        store.put_if_absent("key", b"")


class OverwritingStore(MemoryStore):
    """A store that ignores the condition of a put, as some S3 servers do."""

    def put_if_absent(self, key: str, data: bytes) -> None:
        self.put(key, data)


class RefusingAndOverwritingStore(MemoryStore):
    """A store that reports that the key exists after it has overwritten it."""

    def put_if_absent(self, key: str, data: bytes) -> None:
        existed = self.exists(key)
        self.put(key, data)
        if existed:
            raise BlobExists(key)


@pytest.mark.parametrize("kind", [OverwritingStore, RefusingAndOverwritingStore])
def test_the_check_detects_a_store_that_ignores_conditions(kind: type[MemoryStore]) -> None:
    store = kind()
    with pytest.raises(NoConditionalPut, match="silently overwrites on a conditional put"):
        check_put_if_absent(store)
    assert list(store.list()) == []


class FramingStore(MemoryStore):
    """A store that keeps the framing of a request as a part of the data."""

    def get(self, key: str) -> bytes:
        return b"5\r\n" + super().get(key)


def test_the_check_detects_a_store_that_changes_the_bytes() -> None:
    with pytest.raises(StoreError, match="returns other bytes than were written"):
        check_put_if_absent(FramingStore())


def test_open_store_parses_uris(tmp_path: Path) -> None:
    assert open_store(str(tmp_path)).uri == str(tmp_path)
    assert open_store(f"file://{tmp_path}/").uri == str(tmp_path)
    assert open_store("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    assert open_store("s3://bucket").uri == "s3://bucket"
    assert open_store("memory://same") is open_store("memory://same")
    with pytest.raises(SettingsError, match="unknown scheme 'gs': use s3://"):
        open_store("gs://bucket/x")
    with pytest.raises(SettingsError, match="names no bucket"):
        open_store("s3:///x")
