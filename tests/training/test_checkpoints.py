"""Checkpoints in a store that fails, is slow or damages them, and how much of that reaches training."""

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from bam_ray.blobs.memory import MemoryStore
from bam_ray.errors import (
    Interrupted,
    StaleLease,
    StoreBusy,
    StoreDenied,
    StoreError,
    StoreUnavailable,
    TrainingError,
)
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.events import CheckpointCommitted, CheckpointRefused, Event
from bam_ray.training.state import TrainingState
from tests.support import tiny
from tests.support.leases import next_lease
from tests.support.training_run import LENGTH, RETENTION, SETTINGS, checkpoints_of, engine, run


class FlakyStore(MemoryStore):
    """A store that fails at the next `down` writes."""

    down = 0
    refused = 0
    failure: type[StoreError] = StoreUnavailable

    def put_file(self, key: str, path: Path) -> None:
        if self.down > 0:
            self.down -= 1
            self.refused += 1
            raise self.failure("no S3 server answers at http://127.0.0.1:1")
        super().put_file(key, path)


class SlowStore(MemoryStore):
    """A store whose writes wait until they are let through, one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.let_through = threading.Semaphore(0)

    def put_if_absent(self, key: str, data: bytes) -> None:
        if "/steps/" in key:
            assert self.let_through.acquire(timeout=60)
        super().put_if_absent(key, data)


def four_attempts() -> Retrying:
    return Retrying(retry=retry_if_exception_type(StoreUnavailable), stop=stop_after_attempt(4), reraise=True)


def open_checkpoints(store: MemoryStore, retention: Retention = RETENTION, **named: Any) -> Checkpoints:
    return checkpoints_of(store, next_lease(store, "branches/x"), retention, retrying=four_attempts(), **named)


def state(step: int = 0) -> TrainingState:
    found = engine().state()
    return TrainingState(found.model, found.weights, found.optimizer, step, live=False)


def trainer(step: int) -> dict[str, Any]:
    return {"step": step, "sampler": {}, "curve": [], "legs": [], "refused": []}


def committed_steps(store: MemoryStore) -> list[int]:
    keys = [key for key in store.list("branches/x/steps/") if key.endswith("manifest.json")]
    return [int(key.split("/")[3].split("-")[1]) for key in keys]


def test_an_upload_is_retried_until_the_store_is_back() -> None:
    store = FlakyStore()
    events: list[Event] = []
    checkpoints = open_checkpoints(store, emit=events.append)
    store.down = 3
    checkpoints.save(state(), trainer(4))
    checkpoints.wait()
    assert events == [CheckpointCommitted(4)]
    assert store.refused >= 1
    found = checkpoints.latest()
    assert found is not None and found.step == 4


@pytest.mark.parametrize("failure", [StoreUnavailable, StoreBusy, StoreDenied, StoreError])
def test_a_store_that_stays_down_fails_the_run_and_is_named(failure: type[StoreError]) -> None:
    store = FlakyStore()
    store.failure = failure
    events: list[Event] = []
    checkpoints = open_checkpoints(store, emit=events.append)
    store.down = 1000
    checkpoints.save(state(), trainer(4))
    with pytest.raises(
        failure, match=r"step 4 could not be written to memory://anonymous: no S3 server answers"
    ) as caught:
        checkpoints.wait()
    assert caught.type is failure, "its kind decides about further attempts"
    assert events == []
    assert committed_steps(store) == []


def test_a_failed_upload_fails_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_ray.training.checkpoints.retry_while_unavailable", four_attempts)
    store = FlakyStore()
    store.down = 1000
    reached = []
    with pytest.raises(StoreUnavailable, match="step 0 could not be written"):
        run(store, lambda step: bool(reached.append(step)))
    assert reached[-1] < 12


def test_only_an_unavailable_store_is_retried() -> None:
    class Broken(MemoryStore):
        tries = 0

        def put_file(self, key: str, path: Path) -> None:
            self.tries += 1
            raise OSError(errno.EIO, "Input/output error")

    store = Broken()
    checkpoints = open_checkpoints(store)
    checkpoints.save(state(), trainer(4))
    with pytest.raises(OSError, match="Input/output"):
        checkpoints.wait()
    assert store.tries <= 5  # the files of one checkpoint, once each


def test_training_waits_only_if_two_uploads_are_pending() -> None:
    store = SlowStore()
    checkpoints = open_checkpoints(store)
    checkpoints.save(state(), trainer(1))
    checkpoints.save(state(), trainer(2))  # returns, although nothing is uploaded
    assert committed_steps(store) == []
    third = threading.Thread(target=checkpoints.save, args=(state(), trainer(3)))
    third.start()
    third.join(timeout=0.3)
    assert third.is_alive(), "a third copy was made while two uploads were pending"
    store.let_through.release()
    third.join(timeout=60)
    assert not third.is_alive()
    assert committed_steps(store) == [1]
    store.let_through.release(2)
    checkpoints.wait()
    assert committed_steps(store) == [2, 3]


def test_old_checkpoints_are_pruned() -> None:
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 10)
    assert {key.split("/")[3] for key in store.list("branches/x/steps/")} == {
        "0001.0001-00000008",
        "0001.0001-00000010",
    }


def test_checkpoints_at_multiples_of_keep_every_stay() -> None:
    store = MemoryStore()
    checkpoints = open_checkpoints(store, Retention(last=1, every=4))
    for step in range(1, 11):
        checkpoints.save(state(), trainer(step))
    checkpoints.wait()
    assert committed_steps(store) == [4, 8, 10]
    checkpoints.clear()
    assert committed_steps(store) == [4, 8]


def test_a_damaged_or_truncated_checkpoint_is_skipped_and_reported() -> None:
    unbroken = run(MemoryStore())
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 9)
    newest = "branches/x/steps/0001.0001-00000009/optimizer.safetensors"
    whole = store.get(newest)
    events: list[Event] = []
    for damage in (whole[:-1] + b"\xff", whole[: len(whole) // 2]):
        store.put(newest, damage)
        checkpoints = checkpoints_of(store, None, emit=events.append)
        found = checkpoints.latest()
        assert found is not None and found.step == 8
        event = events.pop()
        assert isinstance(event, CheckpointRefused) and event.checkpoint == "0001.0001-00000009"
        assert "0001.0001-00000009/optimizer.safetensors does not match its manifest" in event.error
        assert checkpoints.refused == [event]
    store.delete(newest)
    assert run(store, events=events) == unbroken
    (refused,) = (event for event in events if isinstance(event, CheckpointRefused))
    assert "optimizer.safetensors is missing" in refused.error


def test_later_checkpoints_store_the_refused_ones() -> None:
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 9)
    newest = "branches/x/steps/0001.0001-00000009/trainer.json"
    store.put(newest, b"{}")
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 10)
    notes = json.loads(store.get("branches/x/steps/0002.0001-00000010/trainer.json"))
    assert [error.split("/steps/")[1] for error in notes["refused"]] == [
        "0001.0001-00000009/trainer.json does not match its manifest: the blob was damaged"
    ]


def test_a_damaged_checkpoint_of_this_attempt_can_be_rewritten() -> None:
    """After a rollback to before a damaged checkpoint, training reaches its step again."""
    store = MemoryStore()
    checkpoints = open_checkpoints(store)
    checkpoints.save(state(), trainer(4))
    checkpoints.wait()
    store.put("branches/x/steps/0001.0001-00000004/optimizer.safetensors", b"")
    assert checkpoints.latest() is None
    checkpoints.save(state(), {**trainer(4), "sampler": {"position": 1}})
    checkpoints.wait()
    found = checkpoints.latest()
    assert found is not None and found.trainer["sampler"] == {"position": 1}


def test_a_stale_attempt_cannot_commit() -> None:
    store = MemoryStore()
    old = open_checkpoints(store)
    next_lease(store, "branches/x")
    old.save(state(), trainer(1))
    with pytest.raises(StaleLease, match=r"attempt 0002\.0001 took over"):
        old.wait()
    assert not list(store.list("branches/x/steps/"))


def test_a_live_state_is_written_before_training_continues() -> None:
    store = SlowStore()
    checkpoints = open_checkpoints(store)
    trained = engine()
    trained.step(tiny.tokens(4, LENGTH), 1e-3)
    found = trained.state()
    live = TrainingState(trained.model, trained.model.state_dict(), found.optimizer, found.step, live=True)
    checkpoints.save(live, trainer(1))
    trained.step(tiny.tokens(4, LENGTH), 1e-3)
    store.let_through.release()
    checkpoints.wait()
    resumable = checkpoints.latest()
    assert resumable is not None
    again = engine(settings=SETTINGS)
    again.load(resumable.folder)
    for name, weight in found.weights.items():
        assert torch.equal(again.model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    "where", ["tempfile.mkdtemp", "pathlib.Path.write_text", "bam_ray.training.state.TrainingState.write"]
)
def test_a_full_local_disk_is_reported(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints, found = open_checkpoints(MemoryStore()), state()
    monkeypatch.setattr(where, full)
    checkpoints.save(found, trainer(1))
    with pytest.raises(TrainingError, match="No space left on device; free space there or set TMPDIR"):
        checkpoints.wait()
