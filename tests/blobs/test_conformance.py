"""The behavior of every blob store, in one suite that runs over all backends."""

import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig

from bam_ray.blobs import BlobStore, s3, s3_uploads
from bam_ray.blobs.check import check_put_if_absent
from bam_ray.blobs.folder import PARTIAL
from bam_ray.blobs.s3 import S3Store
from bam_ray.errors import BlobExists, BlobNotFound, StoreError
from bam_ray.units import MIB
from cluster.s3_server import BUCKET

RACERS = 8
REAL_SERVERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("seaweedfs", "ceph")]
ODD_KEYS = ["with space", "plus+percent%41", "ünïcødé/名前", "a=b&c?d#e", "dots.in..name", "~tilde'quote", "-", "A"]


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000], ids=["empty", "one byte", "1.2 MB"])
def test_get_returns_what_was_put(store: BlobStore, data: bytes) -> None:
    store.put("some/key", data)
    assert store.get("some/key") == data
    assert store.size("some/key") == len(data)
    assert store.exists("some/key")


def test_put_replaces_the_previous_bytes(store: BlobStore) -> None:
    store.put("key", b"long before")
    store.put("key", b"after")
    assert store.get("key") == b"after"
    assert list(store.list()) == ["key"]


@pytest.mark.parametrize(
    ("start", "length"), [(0, 4), (3, 5), (0, 10), (9, 1), (8, 100), (10, 1), (5000, 3), (2, 0), (10, 0)]
)
def test_ranges_are_slices(store: BlobStore, start: int, length: int) -> None:
    data = b"0123456789"
    store.put("key", data)
    assert store.get_range("key", start, length) == data[start : start + length]


def test_any_range_of_an_empty_blob_is_empty(store: BlobStore) -> None:
    store.put("key", b"")
    assert store.get_range("key", 0, 10) == b""


@pytest.mark.parametrize("key", ODD_KEYS)
def test_keys_keep_every_character(store: BlobStore, key: str) -> None:
    store.put(key, key.encode())
    assert store.get(key) == key.encode()
    assert list(store.list()) == [key]


def test_missing_keys_raise_blob_not_found(store: BlobStore, tmp_path: Path) -> None:
    store.put("there/inner", b"data")
    for key in ("missing", "there", "there/inner/below", "the"):
        assert not store.exists(key)
        for read in (
            store.get,
            store.size,
            lambda key: store.get_range(key, 0, 3),
            lambda key: store.get_range(key, 0, 0),
        ):
            with pytest.raises(BlobNotFound, match=key):
                read(key)
        with pytest.raises(BlobNotFound, match=key):
            store.get_file(key, tmp_path / "never")
        store.delete(key)
    assert list(store.list()) == ["there/inner"]


def test_delete_removes_one_key(store: BlobStore) -> None:
    store.put("a", b"1")
    store.put("ab", b"2")
    store.delete("a")
    assert not store.exists("a")
    assert store.get("ab") == b"2"


@pytest.mark.parametrize("key", ["", "/absolute", "folder/", "a//b", ".", "..", "../outside", "a/../b", "a/./b"])
def test_invalid_keys_are_refused(store: BlobStore, key: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"data")
    for operation in (
        store.get,
        store.size,
        store.exists,
        store.delete,
        lambda key: store.put(key, b""),
        lambda key: store.put_if_absent(key, b""),
        lambda key: store.put_file(key, file),
        lambda key: store.put_stream(key, iter([b"data"])),
        lambda key: store.get_file(key, file),
        lambda key: store.get_range(key, 0, 1),
    ):
        with pytest.raises(StoreError, match="is not a valid key") as caught:
            operation(key)
        assert type(caught.value) is StoreError
    assert list(store.list()) == []


def test_lists_are_sorted_by_the_whole_key(store: BlobStore) -> None:
    # '-' and '.' sort before '/' and digits after it, so listing a tree of folders would give another order
    keys = ["a-b", "a.b", "a/b", "a/b-c", "a/b/c", "a0", "ab", "b", "B", "a/é"]
    keys.remove("a/b")  # S3 can hold it next to a/b/c, but a folder cannot
    for key in reversed(keys):
        store.put(key, b"")
    assert list(store.list()) == sorted(keys)


def test_a_prefix_need_not_end_at_a_slash(store: BlobStore) -> None:
    for key in ("run/1", "run/2", "run2/1", "runs", "other/run/1"):
        store.put(key, b"")
    assert list(store.list("run/")) == ["run/1", "run/2"]
    assert list(store.list("run")) == ["run/1", "run/2", "run2/1", "runs"]
    assert list(store.list("run/1")) == ["run/1"]
    assert list(store.list("run/1/")) == []
    assert list(store.list("nothing/here")) == []
    assert len(list(store.list())) == 5


def test_an_empty_store_lists_nothing(store: BlobStore) -> None:
    assert list(store.list()) == []
    assert list(store.list("a/b/")) == []


@pytest.mark.parametrize("store", ["folder", "memory", *REAL_SERVERS], indirect=True)
def test_list_returns_more_than_one_page(store: BlobStore) -> None:
    # S3 returns at most 1000 keys per page; a tree of folders would sort these names differently from S3
    keys = [f"page{separator}{number:03d}" for separator in "-./" for number in range(350)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert list(store.list("page")) == keys
    assert list(store.list("page/")) == keys[700:]


def test_put_if_absent_writes_once(store: BlobStore) -> None:
    store.put_if_absent("key", b"first")
    with pytest.raises(BlobExists, match="key"):
        store.put_if_absent("key", b"second")
    assert store.get("key") == b"first"
    store.delete("key")
    store.put_if_absent("key", b"third")
    assert store.get("key") == b"third"


def test_exactly_one_racing_writer_wins(store: BlobStore) -> None:
    for number in range(4):
        barrier = threading.Barrier(RACERS)

        def race(racer: int, key: str = f"race/{number}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                store.put_if_absent(key, f"racer {racer}".encode())
            except BlobExists:
                return False
            return True

        with ThreadPoolExecutor(max_workers=RACERS) as pool:
            won = [racer for racer, won in enumerate(pool.map(race, range(RACERS))) if won]
        assert len(won) == 1
        assert store.get(f"race/{number}") == f"racer {won[0]}".encode()


@pytest.mark.parametrize("size", [0, 100, 11 * MIB + 7], ids=["empty", "small", "multipart"])
def test_files_are_stored_unchanged(
    store: BlobStore, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "TRANSFER", TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB))
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(os.urandom(size))
    store.put_file("folder/file", sent)
    store.get_file("folder/file", received)
    assert received.read_bytes() == sent.read_bytes()
    assert store.size("folder/file") == size
    assert store.get_range("folder/file", max(0, size - 3), 10) == sent.read_bytes()[-3:]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the smallest size of a part that S3 accepts, 5 MiB."""
    monkeypatch.setattr(s3_uploads, "PART_BYTES", 5 * MIB)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    "lengths",
    [[], [0], [100, 0, 1], [5 * MIB], [MIB] * 11 + [7], [23 * MIB + 5]],
    ids=["no chunk", "empty", "small", "one part", "many chunks per part", "many parts per chunk"],
)
def test_streams_are_stored_unchanged(store: BlobStore, lengths: list[int]) -> None:
    data = [os.urandom(length) for length in lengths]
    store.put("key", b"before")
    store.put_stream("key", (memoryview(chunk) if number % 2 else chunk for number, chunk in enumerate(data)))
    assert store.get("key") == b"".join(data)
    assert list(store.list()) == ["key"]


@pytest.mark.usefixtures("small_parts")
def test_stream_chunks_may_share_one_buffer(store: BlobStore) -> None:
    buffer = bytearray(2 * MIB)

    def filled() -> Iterator[memoryview]:
        for value in range(6):
            buffer[:] = bytes([value]) * len(buffer)
            yield memoryview(buffer)

    store.put_stream("key", filled())
    assert store.get("key") == b"".join(bytes([value]) * len(buffer) for value in range(6))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    "error", [FileNotFoundError("shard"), FileExistsError("x"), KeyboardInterrupt(), StoreError("y")]
)
@pytest.mark.parametrize("mib", [1, 12], ids=["before", "during a multipart upload"])
def test_a_failed_stream_leaves_no_trace(store: BlobStore, mib: int, error: BaseException) -> None:
    def breaking() -> Iterator[bytes]:
        yield from (bytes(MIB) for _ in range(mib))
        raise error

    store.put("there", b"before")
    for key in ("there", "new"):
        with pytest.raises(type(error)) as caught:
            store.put_stream(key, breaking())
        assert caught.value is error
    assert list(store.list()) == ["there"]
    assert store.get("there") == b"before"
    assert leftovers(store) == []


def leftovers(store: BlobStore) -> list[str]:
    """Return what remains of unfinished uploads and does not appear in lists."""
    if isinstance(store, S3Store):
        uploads = store.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        uris = [f"s3://{BUCKET}/{upload['Key']}" for upload in uploads]
        return [uri for uri in uris if uri.startswith(f"{store.uri}/")]
    return [str(path) for path in Path(store.uri).rglob(f"{PARTIAL}*")]


def test_the_conditional_put_check_passes_and_leaves_no_blob(store: BlobStore) -> None:
    check_put_if_absent(store)
    assert list(store.list()) == []


def test_stores_on_disk_or_network_can_be_pickled(store: BlobStore) -> None:
    if store.uri.startswith("memory://"):
        with pytest.raises(TypeError, match="pickle"):  # a copy in another process would be empty
            pickle.dumps(store)
        return
    store.put("key", b"data")
    assert pickle.loads(pickle.dumps(store)).get("key") == b"data"
