"""Servers that have no conditional puts: refused, or used under a weaker promise that is said."""

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from bam_ray.blobs import open_store
from bam_ray.blobs.check import checked_store
from bam_ray.errors import BlobExists, NoConditionalPut
from bam_ray.settings import StoreSettings
from cluster.s3_server import BUCKET


def settings(endpoint: str, promise: str) -> StoreSettings:
    return StoreSettings.model_validate({"uri": f"s3://{BUCKET}/weak", "endpoint": endpoint, "promise": promise})


def test_a_server_without_conditional_puts_is_refused(weak_server: tuple[str, str]) -> None:
    endpoint, words = weak_server
    for asked in (settings(endpoint, "strict"), StoreSettings(uri=f"s3://{BUCKET}/weak", endpoint=endpoint)):
        mending = r"use a server that honours If-None-Match .* or a folder, or accept that with store\.promise=weak"
        with pytest.raises(NoConditionalPut, match=f"{words}, so two attempts could both commit: {mending}") as caught:
            checked_store(asked)
        assert "\n" not in str(caught.value)


def test_a_weaker_promise_is_said_and_kept(weak_server: tuple[str, str]) -> None:
    endpoint, words = weak_server
    store, said = checked_store(settings(endpoint, "weak"))
    assert said is not None
    assert "\n" not in said
    assert words.replace("\\", "") in said
    assert "(store.promise: weak): a commit only looks first whether another is there" in said
    assert list(store.list()) == []
    for store_there in (store, pickle.loads(pickle.dumps(store))):  # as a worker gets it
        store_there.put_if_absent("key", b"first")
        with pytest.raises(BlobExists, match="weak/key exists already"):
            store_there.put_if_absent("key", b"second")
        assert store_there.get("key") == b"first"
        store_there.delete("key")


def test_what_the_weaker_promise_lacks(weak_server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = checked_store(settings(weak_server[0], "weak"))
    looked = threading.Barrier(2)
    really = type(store).exists

    def both_look_first(self: object, key: str) -> bool:
        there = really(self, key)
        looked.wait(timeout=30)
        return there

    monkeypatch.setattr(type(store), "exists", both_look_first)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda data: store.put_if_absent("raced", data), [b"one", b"other"]))  # neither is told
    assert store.get("raced") in (b"one", b"other")
    store.delete("raced")


def test_a_weak_promise_asked_of_a_store_that_keeps_the_strict_one(
    moto_endpoint: str, credentials: Callable[[str, str], None]
) -> None:
    credentials("any", "any")
    store, said = checked_store(settings(moto_endpoint, "weak"))
    assert said is None
    assert pickle.dumps(store) == pickle.dumps(open_store(f"s3://{BUCKET}/weak", moto_endpoint))
