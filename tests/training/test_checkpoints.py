"""Checkpoints reach a store that fails, is slow or damages them; training hears of it no more than it must."""

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.leases import Lease
from bam_ray.errors import Interrupted, StaleLease, StoreUnavailable, TrainingError
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.state import State
from tests.support import tiny
from tests.support.training_run import LENGTH, RETENTION, SETTINGS, engine, run


class Flaky(MemoryStore):
    """A store that is down for the next `down` writes."""

    down = 0
    refused = 0

    def put_file(self, key: str, path: Path) -> None:
        if self.down > 0:
            self.down -= 1
            self.refused += 1
            raise StoreUnavailable("no S3 server answers at http://127.0.0.1:1")
        super().put_file(key, path)


class Slow(MemoryStore):
    """A store whose writes wait until `opened`, one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Semaphore(0)

    def put_if_absent(self, key: str, data: bytes) -> None:
        if "/steps/" in key:
            assert self.opened.acquire(timeout=60)
        super().put_if_absent(key, data)


def four_times() -> Retrying:
    return Retrying(retry=retry_if_exception_type(StoreUnavailable), stop=stop_after_attempt(4), reraise=True)


def checkpoints(store: MemoryStore, retention: Retention = RETENTION, **named: Any) -> Checkpoints:
    lease = Lease.take(store, "branches/x")
    return Checkpoints(store, "branches", "x", lease, retention, retrying=four_times(), **named)


def state(step: int = 0) -> State:
    found = engine().state()
    return State(found.model, found.weights, found.optimizer, step, live=False)


def trainer(step: int) -> dict[str, Any]:
    return {"step": step, "sampler": {}, "curve": [], "legs": [], "refused": []}


def steps(store: MemoryStore) -> list[int]:
    """Of committed checkpoints."""
    keys = [key for key in store.list("branches/x/steps/") if key.endswith("manifest.json")]
    return [int(key.split("/")[3].split("-")[1]) for key in keys]


def test_an_upload_is_tried_again_until_the_store_is_back() -> None:
    store = Flaky()
    kept = checkpoints(store)
    store.down = 3
    kept.save(state(), trainer(4))
    kept.wait()
    assert kept.committed_step == 4
    assert store.refused >= 1
    found = kept.latest()
    assert found is not None and found.step == 4


def test_a_store_that_stays_down_ends_the_run_and_is_named() -> None:
    store = Flaky()
    kept = checkpoints(store)
    store.down = 1000
    kept.save(state(), trainer(4))
    with pytest.raises(
        StoreUnavailable, match=r"step 4 could not be written to memory://anonymous: no S3 server answers"
    ):
        kept.wait()
    assert kept.committed_step is None
    assert steps(store) == []


def test_the_loop_hears_of_a_failed_upload_at_its_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_ray.training.checkpoints.patient", four_times)
    store = Flaky()
    store.down = 1000
    reached = []
    with pytest.raises(StoreUnavailable, match="step 0 could not be written"):
        run(store, lambda step: bool(reached.append(step)))
    assert reached[-1] < 12


def test_only_a_store_that_is_away_is_asked_again() -> None:
    class Broken(MemoryStore):
        tries = 0

        def put_file(self, key: str, path: Path) -> None:
            self.tries += 1
            raise OSError(errno.EIO, "Input/output error")

    store = Broken()
    kept = checkpoints(store)
    kept.save(state(), trainer(4))
    with pytest.raises(OSError, match="Input/output"):
        kept.wait()
    assert store.tries <= 5  # the files of one checkpoint, once each


def test_training_waits_for_no_upload_but_with_two_on_their_way() -> None:
    store = Slow()
    kept = checkpoints(store)
    kept.save(state(), trainer(1))
    kept.save(state(), trainer(2))  # returns, though nothing is through
    assert steps(store) == []
    third = threading.Thread(target=kept.save, args=(state(), trainer(3)))
    third.start()
    third.join(timeout=0.3)
    assert third.is_alive(), "a third copy was made while two were waiting"
    store.opened.release()
    third.join(timeout=60)
    assert not third.is_alive()
    assert steps(store) == [1]
    store.opened.release(2)
    kept.wait()
    assert steps(store) == [2, 3]


def test_old_checkpoints_are_dropped() -> None:
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 10)
    assert {key.split("/")[3] for key in store.list("branches/x/steps/")} == {"0001-00000008", "0001-00000010"}


def test_some_are_kept_for_good() -> None:
    store = MemoryStore()
    kept = checkpoints(store, Retention(last=1, every=4))
    for step in range(1, 11):
        kept.save(state(), trainer(step))
    kept.wait()
    assert steps(store) == [4, 8, 10]
    kept.clear()
    assert steps(store) == [4, 8]


def test_a_damaged_or_cut_off_checkpoint_is_passed_over_and_said() -> None:
    unbroken = run(MemoryStore())
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 9)
    newest = "branches/x/steps/0001-00000009/optimizer.safetensors"
    whole = store.get(newest)
    told: list[tuple[str, dict[str, Any]]] = []
    for damage in (whole[:-1] + b"\xff", whole[: len(whole) // 2]):
        store.put(newest, damage)
        kept = Checkpoints(store, "branches", "x", None, RETENTION, lambda what, **facts: told.append((what, facts)))
        found = kept.latest()
        assert found is not None and found.step == 8
        what, facts = told.pop()
        assert (what, facts["checkpoint"]) == ("refused", "0001-00000009")
        assert "0001-00000009/optimizer.safetensors does not match its manifest" in facts["error"]
        assert kept.refused == [facts["error"]]
    store.delete(newest)
    assert run(store, tell=lambda what, **facts: told.append((what, facts))) == unbroken
    assert "optimizer.safetensors does not exist" in dict(told)["refused"]["error"]


def test_what_was_refused_is_remembered_by_later_checkpoints() -> None:
    store = MemoryStore()
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 9)
    newest = "branches/x/steps/0001-00000009/trainer.json"
    store.put(newest, b"{}")
    with pytest.raises(Interrupted):
        run(store, lambda step: step == 10)
    notes = json.loads(store.get("branches/x/steps/0002-00000010/trainer.json"))
    assert [error.split("/steps/")[1] for error in notes["refused"]] == [
        "0001-00000009/trainer.json does not match its manifest: the blob was damaged"
    ]


def test_a_damaged_checkpoint_of_this_attempt_can_be_written_anew() -> None:
    """After a rollback past a damaged checkpoint its step comes again."""
    store = MemoryStore()
    kept = checkpoints(store)
    kept.save(state(), trainer(4))
    kept.wait()
    store.put("branches/x/steps/0001-00000004/optimizer.safetensors", b"")
    assert kept.latest() is None
    kept.save(state(), {**trainer(4), "sampler": {"position": 1}})
    kept.wait()
    found = kept.latest()
    assert found is not None and found.trainer["sampler"] == {"position": 1}


def test_a_stale_attempt_cannot_commit() -> None:
    store = MemoryStore()
    old = checkpoints(store)
    Lease.take(store, "branches/x")
    old.save(state(), trainer(1))
    with pytest.raises(StaleLease, match="attempt 2 took over"):
        old.wait()
    assert not list(store.list("branches/x/steps/"))


def test_a_live_state_is_written_before_training_goes_on() -> None:
    store = Slow()
    kept = checkpoints(store)
    trained = engine()
    trained.step(tiny.tokens(4, LENGTH), 1e-3)
    found = trained.state()
    live = State(trained.model, trained.model.state_dict(), found.optimizer, found.step, live=True)
    kept.save(live, trainer(1))
    trained.step(tiny.tokens(4, LENGTH), 1e-3)
    store.opened.release()
    kept.wait()
    resumable = kept.latest()
    assert resumable is not None
    again = engine(settings=SETTINGS)
    again.load(resumable.folder)
    for name, weight in found.weights.items():
        assert torch.equal(again.model.state_dict()[name], weight), name


@pytest.mark.parametrize("where", ["tempfile.mkdtemp", "pathlib.Path.write_text", "bam_ray.training.state.State.write"])
def test_no_room_for_the_local_folder_is_said(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept, found = checkpoints(MemoryStore()), state()
    monkeypatch.setattr(where, full)
    kept.save(found, trainer(1))
    with pytest.raises(TrainingError, match="No space left on device; make room there or set TMPDIR"):
        kept.wait()
