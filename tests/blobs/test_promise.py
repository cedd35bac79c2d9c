"""Servers without conditional puts: refused by default, or used with the weak promise and a warning."""

import pickle
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from bam_ray.blobs import open_store, patience
from bam_ray.blobs.check import open_checked_store
from bam_ray.errors import BlobExists, NoConditionalPut, StoreBusy
from bam_ray.settings import StoreSettings
from cluster.s3_server import BUCKET
from tests.support.faults.flaky_proxy import FlakyProxy


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


def test_a_busy_server_is_asked_again(fault_proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 30.0)
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        fault_proxy.recover()

    fault_proxy.refuse()
    store, _ = open_checked_store(settings(fault_proxy.endpoint, "strict"), report)
    assert list(store.list("probes/")) == []
    (line,) = lines
    assert re.search(r"the S3 server answered .*: trying again in \d+ s$", line)


def test_a_server_that_stays_busy_is_refused(fault_proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.0)
    fault_proxy.refuse()
    with pytest.raises(StoreBusy, match="the S3 server answered"):
        open_checked_store(settings(fault_proxy.endpoint, "strict"))
