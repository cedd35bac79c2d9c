"""Conditional puts whose answers are lost: a writer recognizes its own blob, and exactly one writer succeeds."""

import os
from pathlib import Path

import pytest

from bam_ray.blobs import put_once
from bam_ray.blobs.check import check_put_if_absent
from bam_ray.blobs.folder import FolderStore
from bam_ray.blobs.memory import MemoryStore
from bam_ray.blobs.s3 import S3Store
from bam_ray.errors import BlobExists, StoreUnavailable
from cluster.s3_server import BUCKET
from tests.support.faults.flaky_proxy import Fault, FlakyProxy


@pytest.fixture
def s3(fault_proxy: FlakyProxy) -> S3Store:
    return S3Store(BUCKET, f"lost-{os.urandom(4).hex()}", fault_proxy.endpoint)


def test_a_repeated_put_recognizes_its_own_blob(s3: S3Store, fault_proxy: FlakyProxy) -> None:
    lost = fault_proxy.add(Fault.lost_answer("PUT", key="/key$", times=2))
    s3.put_if_absent("key", b"mine")
    assert lost.hits == 2
    assert s3.get("key") == b"mine"


def test_equal_bytes_of_another_writer_are_not_ours(s3: S3Store, fault_proxy: FlakyProxy) -> None:
    s3.put_if_absent("key", b"equal")
    with pytest.raises(BlobExists):
        s3.put_if_absent("key", b"equal")
    s3.put("plain", b"equal")
    with pytest.raises(BlobExists):
        s3.put_if_absent("plain", b"equal")
    refused = fault_proxy.add(Fault.lost_answer("PUT", key="/key$", times=1))  # the lost answer is a refusal
    with pytest.raises(BlobExists):
        s3.put_if_absent("key", b"equal")
    assert refused.hits == 1


def test_an_unknown_outcome_can_be_repeated(s3: S3Store, fault_proxy: FlakyProxy) -> None:
    lost = fault_proxy.add(Fault.lost_answer("PUT", key="/key$"))
    with pytest.raises(StoreUnavailable):
        put_once(s3, "key", b"mine")
    assert lost.hits > 1
    fault_proxy.recover()
    put_once(s3, "key", b"mine")
    with pytest.raises(BlobExists):
        put_once(s3, "key", b"other")
    assert s3.get("key") == b"mine"


def test_a_repeated_link_recognizes_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def repeated(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", repeated)
    store = FolderStore(tmp_path)
    store.put_if_absent("key", b"mine")
    assert store.get("key") == b"mine"
    with pytest.raises(BlobExists):
        store.put_if_absent("key", b"mine")


def test_the_check_survives_lost_answers(s3: S3Store, fault_proxy: FlakyProxy) -> None:
    lost = [fault_proxy.add(Fault.lost_answer("PUT", key=key, times=3)) for key in ("-order", "-race-1")]
    check_put_if_absent(s3)
    assert [fault.hits for fault in lost] == [3, 3]
    assert list(s3.list()) == []


class ForgetfulStore(MemoryStore):
    """A store whose answers to the puts with these numbers are lost, and which reports a repetition as refused."""

    def __init__(self, lost: set[int]) -> None:
        super().__init__()
        self.puts = 0
        self._lost = lost

    def put_if_absent(self, key: str, data: bytes) -> None:
        with self._lock:
            self.puts += 1
            number = self.puts
        super().put_if_absent(key, data)
        if number in self._lost:
            raise BlobExists(key)


def test_the_check_needs_no_tokens() -> None:
    store = ForgetfulStore({1, 3})
    check_put_if_absent(store)
    assert store.puts > 3
