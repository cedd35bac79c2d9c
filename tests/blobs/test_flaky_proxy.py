"""The proxy of the tests forwards unchanged bytes, and its faults are those that it was asked for."""

import os
import time
from pathlib import Path

import pytest

from bam_ray.blobs.s3 import S3Store
from bam_ray.errors import StoreDenied, StoreUnavailable
from bam_ray.units import MIB
from cluster.s3_server import BUCKET, S3Settings
from tests.support.faults.flaky_proxy import Fault, FlakyProxy


@pytest.fixture
def store(fault_proxy: FlakyProxy) -> S3Store:
    return S3Store(BUCKET, f"proxy-{os.urandom(4).hex()}", fault_proxy.endpoint)


def test_an_outage_ends_with_recovery(store: S3Store, fault_proxy: FlakyProxy) -> None:
    store.put("key", b"data")
    fault_proxy.refuse()
    with pytest.raises(StoreUnavailable, match="answered 503"):
        store.get("key")
    assert fault_proxy.refused >= 4
    fault_proxy.recover()
    assert store.get("key") == b"data"


def test_slow_answers_arrive(store: S3Store, fault_proxy: FlakyProxy) -> None:
    store.put("key", bytes(MIB))

    def seconds() -> float:
        begin = time.monotonic()
        assert store.get("key") == bytes(MIB)
        return time.monotonic() - begin

    usual = min(seconds() for _ in range(5))
    fault_proxy.slow_down(50.0)
    assert seconds() > 3 * usual


def test_faults_hit_chosen_requests(store: S3Store, fault_proxy: FlakyProxy) -> None:
    denied = fault_proxy.add(Fault.denied("GET", key="/secret/", times=1))
    for key in ("open/key", "secret/key"):
        store.put(key, b"data")
    assert store.get("open/key") == b"data"
    with pytest.raises(StoreDenied, match="AccessDenied"):
        store.get("secret/key")
    assert store.get("secret/key") == b"data"
    assert denied.hits == 1


def test_faults_hit_a_share_of_the_requests(store: S3Store, fault_proxy: FlakyProxy) -> None:
    store.put("key", b"data")
    denied = fault_proxy.add(Fault.denied("GET", chance=0.3))
    refused = 0
    for _ in range(60):
        try:
            store.get("key")
        except StoreDenied:
            refused += 1
    assert refused == denied.hits
    assert 5 <= refused <= 35


@pytest.mark.slow
def test_large_files_pass_unchanged(s3_server: S3Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    proxy = FlakyProxy(s3_server.ports[0])
    store = S3Store(BUCKET, f"proxy-{os.urandom(4).hex()}", proxy.endpoint)
    (tmp_path / "sent").write_bytes(os.urandom(70 * MIB + 1))
    lost = proxy.add(Fault.lost_answer("PUT", header="partNumber=2", times=1))
    cut = proxy.add(Fault.cut_body(key="/key$", times=4))
    store.put_file("key", tmp_path / "sent")
    store.get_file("key", tmp_path / "received")
    assert (tmp_path / "received").read_bytes() == (tmp_path / "sent").read_bytes()
    assert (lost.hits, cut.hits) == (1, 4)
    proxy.close()
