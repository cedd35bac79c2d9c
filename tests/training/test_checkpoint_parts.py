"""Checkpoints whose parts are uploaded by several ranks; the ranks are instances of `Checkpoints` in one process."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bam_ray.blobs.memory import MemoryStore
from bam_ray.checkpoint.manifest import MANIFEST
from bam_ray.errors import StaleLease, TrainingError
from bam_ray.training import checkpoints as checkpoints_module
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.state import TrainingState, read_optimizer, read_weights
from tests.support import tiny
from tests.support.leases import next_lease
from tests.support.state_parts import part_of
from tests.support.training_run import LENGTH, RETENTION, checkpoints_of, engine

RANKS = 3


def open_group(store: MemoryStore, retention: Retention = RETENTION) -> list[Checkpoints]:
    """Return the checkpoints of a new attempt by rank; all ranks write under the lease of rank 0."""
    first = checkpoints_of(store, next_lease(store, "branches/x"), retention)
    others = [checkpoints_of(store, None, retention) for _ in range(1, RANKS)]
    number = []
    first.share_lease(lambda mine: number.append(mine) or [mine])  # type: ignore[func-returns-value]
    for each in others:
        each.share_lease(lambda mine: number)
    return [first, *others]


@pytest.fixture(scope="module")
def state() -> TrainingState:
    trained = engine()
    trained.step(tiny.tokens(4, LENGTH), 1e-3)
    found = trained.state()
    assert found is not None
    return found


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(checkpoints_module, "STORE_TIMEOUT", 0.2)
    monkeypatch.setattr(checkpoints_module, "SLOWEST_UPLOAD", 1 << 40)


def trainer(step: int) -> dict[str, Any]:
    return {"step": step, "sampler": {}, "curve": [], "legs": [], "refused": []}


def committed(store: MemoryStore) -> list[str]:
    return [key.split("/")[3] for key in store.list("branches/x/steps/") if key.endswith(f"/{MANIFEST}")]


def save(ranks: list[Checkpoints], state: TrainingState, step: int, *which: int) -> None:
    for rank in which:
        ranks[rank].save(part_of(state, rank, RANKS), trainer(step))


def test_the_parts_of_all_ranks_are_one_checkpoint(state: TrainingState) -> None:
    store = MemoryStore()
    ranks = open_group(store)
    save(ranks, state, 1, 0, 1, 2)
    for each in reversed(ranks):
        each.wait()
    found = ranks[2].latest()
    assert found is not None and found.step == 1
    weights, (optimizer, step) = read_weights(found.folder), read_optimizer(found.folder)
    assert step == state.step
    for wanted, read in ((state.weights, weights), (state.optimizer, optimizer)):
        assert all(torch.equal(read[name], tensor) for name, tensor in wanted.items())
    again = engine()
    again.load(found.folder)
    assert again.updates == state.step
    assert not list(Path(found.folder).glob("part-*.json")), "the digests of parts are in the manifest"


def test_nothing_is_committed_before_the_last_part(state: TrainingState, impatient: None) -> None:
    store = MemoryStore()
    ranks = open_group(store)
    save(ranks, state, 1, 0, 2)
    with pytest.raises(TrainingError, match="rank 1 did not upload its part of a checkpoint in time"):
        ranks[0].wait()
    with pytest.raises(TrainingError, match="rank 0 did not commit a checkpoint in time"):
        ranks[2].wait()
    assert committed(store) == []
    assert ranks[0].latest() is None


def test_all_ranks_wait_for_the_commit(state: TrainingState) -> None:
    store = MemoryStore()
    ranks = open_group(store)
    for step in (1, 2):
        save(ranks, state, step, 1, 2)
    waiting = threading.Thread(target=ranks[1].wait)
    waiting.start()
    waiting.join(timeout=0.3)
    assert waiting.is_alive() and committed(store) == []
    for step in (1, 2):
        save(ranks, state, step, 0)
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    assert committed(store) == ["0001.0001-00000001", "0001.0001-00000002"]


def test_pruning_leaves_the_parts_of_the_next_checkpoint(state: TrainingState) -> None:
    store = MemoryStore()
    ranks = open_group(store, Retention(1, None))
    store.put("branches/x/steps/0001.0001-00000001/files/x/part", b"")
    store.put("branches/x/steps/0001.0001-00000003/files/x/part", b"")
    save(ranks, state, 2, 0, 1, 2)
    for each in ranks:
        each.wait()
    assert {key.split("/")[3] for key in store.list("branches/x/steps/")} == {
        "0001.0001-00000002",
        "0001.0001-00000003",
    }


def test_parts_of_an_earlier_save_do_not_count(state: TrainingState, impatient: None) -> None:
    """After a rollback to before a damaged checkpoint, its step is reached again in the same attempt."""
    store = MemoryStore()
    ranks = open_group(store)
    save(ranks, state, 4, 0, 1, 2)
    for each in ranks:
        each.wait()
    before = set(store.list("branches/x/steps/"))
    save(ranks, state, 4, 1)
    with pytest.raises(TrainingError, match="rank 0 did not commit"):  # although there is a manifest of step 4
        ranks[1].wait()
    save(ranks, state, 4, 0)
    with pytest.raises(TrainingError, match="rank 2 did not upload its part"):
        ranks[0].wait()
    assert committed(store) == []
    save(ranks, state, 4, 2)
    with pytest.raises(TrainingError, match="rank 0 did not commit"):
        ranks[2].wait()
    save(ranks, state, 4, 0, 1, 2)
    for each in ranks:
        each.wait()
    assert committed(store) == ["0001.0001-00000004"]
    found = ranks[0].latest()
    assert found is not None and read_optimizer(found.folder)[1] == state.step
    manifest = f"branches/x/steps/0001.0001-00000004/{MANIFEST}"
    assert set(store.list("branches/x/steps/")) & before == {manifest}, "earlier files are deleted"


def test_a_stale_group_commits_nothing(state: TrainingState, impatient: None) -> None:
    store = MemoryStore()
    ranks = open_group(store)
    save(ranks, state, 1, 0)
    time.sleep(0.05)  # rank 0 may already wait for the others
    next_lease(store, "branches/x")
    save(ranks, state, 1, 1, 2)
    for each in ranks:
        with pytest.raises(StaleLease, match=r"attempt 0002\.0001 took over"):
            each.wait()
    assert committed(store) == []


class DamagingStore(MemoryStore):
    """A store that writes a wrong digest for a part."""

    def put(self, key: str, data: bytes) -> None:
        if key.endswith("part-0002.json"):
            digests = json.loads(data)
            next(iter(digests.values()))["sha256"] = "0" * 64
            data = json.dumps(digests).encode()
        super().put(key, data)


def test_a_changed_digest_is_found_by_readers(state: TrainingState) -> None:
    store = DamagingStore()
    ranks = open_group(store)
    save(ranks, state, 1, 0, 1, 2)
    for each in ranks:
        each.wait()
    assert ranks[0].latest() is None
    assert "part-0003-of-0003.safetensors does not match its manifest" in ranks[0].refused[0].error
