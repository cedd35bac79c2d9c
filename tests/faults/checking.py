"""What must hold of a run's branches after whatever happened, read from its blob store alone."""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from faults.tale import Unbroken, branch_id, branch_manifest, read_branch

from bam_ray.blobs import BlobStore
from bam_ray.settings import Recipe


@dataclass(frozen=True)
class Log:
    """One attempt at a branch, by its lease and its event log; the log of one that died early may be empty."""

    attempt: int
    taken: datetime
    events: list[dict[str, Any]]

    def named(self, what: str) -> list[dict[str, Any]]:
        """Its events of one name."""
        return [event for event in self.events if event["event"] == what]

    @property
    def checkpoints(self) -> list[int]:
        """Steps whose checkpoints were acknowledged."""
        return [event["step"] for event in self.named("checkpoint")]


def check_branches(store: BlobStore, recipe: Recipe, unbroken: dict[str, Unbroken]) -> dict[str, list[Log]]:
    """Assert that every branch was committed whole and came to what an undisturbed run does, and that its attempts
    were fenced and lost nothing that was acknowledged; returns the attempts by domain."""
    logs = {domain: attempts(store, recipe, domain) for domain in recipe.branch.domains}
    for domain, expected in unbroken.items():
        check_artifact(store, recipe, domain, expected)
        check_attempts(logs[domain])
    return logs


def attempts(store: BlobStore, recipe: Recipe, domain: str) -> list[Log]:
    """All attempts at a branch so far, oldest first."""
    prefix = f"branches/{branch_id(recipe, domain)}"
    events = {
        int(key.rpartition("/")[2].removesuffix(".jsonl")): [json.loads(line) for line in store.get(key).splitlines()]
        for key in store.list(f"{prefix}/events/")
    }
    leases = {
        int(key.rpartition("/")[2].removesuffix(".json")): datetime.fromisoformat(json.loads(store.get(key))["taken"])
        for key in store.list(f"{prefix}/leases/")
    }
    assert set(events) <= set(leases)
    return [Log(number, taken, events.get(number, [])) for number, taken in sorted(leases.items())]


def check_artifact(store: BlobStore, recipe: Recipe, domain: str, expected: Unbroken) -> None:
    """The last step was reached, every file is what the manifest says, and all is as in an undisturbed run."""
    manifest = branch_manifest(store, recipe, domain)
    assert manifest.step == recipe.branch.training.steps
    for name, entry in manifest.files.items():
        data = store.get(f"branches/{manifest.id}/{name}")
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256), f"{domain}: {name}"
    found = read_branch(store, recipe, domain)
    differing = [step for step, pair in enumerate(zip(found.nlls, expected.nlls, strict=True), 1) if len(set(pair)) > 1]
    assert not differing, f"{domain}: other losses from step {differing[0]} on"
    assert found.weights == expected.weights, domain


def check_attempts(logs: list[Log]) -> None:
    """Attempts are numbered without gaps, checkpoints only go forward, none is written by an attempt that another took
    over from, and each attempt goes on from the newest that was acknowledged before it, unless it says why not."""
    assert [log.attempt for log in logs] == list(range(1, len(logs) + 1))
    for number, log in enumerate(logs):
        floor = -1
        for event in log.events:
            if event["event"] in ("resumed", "rolled_back"):
                floor = event.get("to", event["step"])
            if event["event"] == "checkpoint":
                assert event["step"] > floor or (event["step"] == floor == 0), (log.attempt, event)
                floor = event["step"]
        for later in logs[number + 1 :]:
            written = [event for event in log.named("checkpoint") if time_of(event) > later.taken]
            assert not written, f"attempt {log.attempt} wrote {written} when {later.attempt} had taken over"
            for resumed in later.named("resumed"):
                refused = {event["checkpoint"] for event in later.named("refused")}
                whole = [step for step in log.checkpoints if f"{log.attempt:04d}-{step:08d}" not in refused]
                assert resumed["step"] >= max(whole, default=0), f"attempt {later.attempt} lost some of {log.attempt}"


def time_of(event: dict[str, Any]) -> datetime:
    """When it was told, to the second."""
    return datetime.fromisoformat(event["time"])
