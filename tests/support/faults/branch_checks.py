"""Checks of the branches of a run after any faults, which read nothing but its blob store."""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.leases import AttemptNumber
from bam_ray.settings import Recipe
from tests.support.faults.reference_run import BranchResult, branch_id, branch_manifest, read_branch


@dataclass(frozen=True)
class AttemptLog:
    """The lease and the event log of one attempt at a branch; the log of an attempt that died early may be empty."""

    attempt: AttemptNumber
    taken: datetime
    events: list[dict[str, Any]]

    def named(self, name: str) -> list[dict[str, Any]]:
        """Return the events called `name`."""
        return [event for event in self.events if event["event"] == name]

    @property
    def checkpoints(self) -> list[int]:
        """The steps whose checkpoints were acknowledged."""
        return [event["step"] for event in self.named("checkpoint")]


def check_branches(store: BlobStore, recipe: Recipe, expected: dict[str, BranchResult]) -> dict[str, list[AttemptLog]]:
    """Assert that all branches are committed with the results of a run without faults.

    The attempts must also have been fenced by their leases, and none may have lost an acknowledged checkpoint.

    Returns:
        The attempts at each branch, by domain.
    """
    logs = {domain: attempts(store, recipe, domain) for domain in recipe.branch.domains}
    for domain, result in expected.items():
        check_artifact(store, recipe, domain, result)
        check_attempts(logs[domain], has_set_aside(store, recipe, domain))
    return logs


def has_set_aside(store: BlobStore, recipe: Recipe, domain: str) -> bool:
    """Return True if a branch was made again because its committed files were damaged."""
    return any(key.endswith(".damaged.json") for key in store.list(f"branches/{branch_id(recipe, domain)}/manifest"))


def attempts(store: BlobStore, recipe: Recipe, domain: str) -> list[AttemptLog]:
    """Return all attempts at a branch up to now, oldest first."""
    prefix = f"branches/{branch_id(recipe, domain)}"
    events = {
        AttemptNumber.parse(key.rpartition("/")[2]): [json.loads(line) for line in store.get(key).splitlines()]
        for key in store.list(f"{prefix}/events/")
    }
    leases = {
        AttemptNumber.parse(key.rpartition("/")[2]): datetime.fromisoformat(json.loads(store.get(key))["taken"])
        for key in store.list(f"{prefix}/leases/")
    }
    assert set(events) <= set(leases)
    return [AttemptLog(number, taken, events.get(number, [])) for number, taken in sorted(leases.items())]


def check_artifact(store: BlobStore, recipe: Recipe, domain: str, expected: BranchResult) -> None:
    """Assert that a branch has reached its last step, that its files match its manifest and that it is as expected."""
    manifest = branch_manifest(store, recipe, domain)
    assert manifest.step == recipe.branch.training.steps
    for name, entry in manifest.files.items():
        data = store.get(f"branches/{manifest.id}/{manifest.folder}/{name}")
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256), f"{domain}: {name}"
    found = read_branch(store, recipe, domain)
    differing = [step for step, pair in enumerate(zip(found.nlls, expected.nlls, strict=True), 1) if len(set(pair)) > 1]
    assert not differing, f"{domain}: the losses differ from step {differing[0]} on"
    assert found.weights == expected.weights, domain


def check_attempts(logs: list[AttemptLog], set_aside: bool = False) -> None:
    """Assert that attempts are fenced and continue from acknowledged checkpoints.

    The steps of checkpoints only increase, an attempt writes no checkpoint after another attempt has taken the lease,
    and each attempt resumes from the newest checkpoint that was acknowledged before it, except those that it refused.
    An attempt that has finished has deleted its checkpoints, so a branch that was `set_aside` starts from step 0.
    """
    for number, log in enumerate(logs):
        check_order(log)
        for later in logs[number + 1 :]:
            written = [event for event in log.named("checkpoint") if time_of(event) > later.taken]
            assert not written, f"attempt {log.attempt} wrote {written} after attempt {later.attempt} had the lease"
            if set_aside and log.named("finished"):
                continue
            for resumed in later.named("resumed"):
                refused = {event["checkpoint"] for event in later.named("refused")}
                whole = [step for step in log.checkpoints if f"{log.attempt}-{step:08d}" not in refused]
                assert resumed["step"] >= max(whole, default=0), f"attempt {later.attempt} lost some of {log.attempt}"


def check_order(log: AttemptLog) -> None:
    """Assert that each checkpoint of an attempt is newer than the one that it continues from."""
    newest = -1
    for event in log.events:
        if event["event"] in ("resumed", "rolled_back"):
            newest = event.get("to", event["step"])
        if event["event"] == "checkpoint":
            assert event["step"] > newest or (event["step"] == newest == 0), (log.attempt, event)
            newest = event["step"]


def time_of(event: dict[str, Any]) -> datetime:
    """Return the time of an event, in whole seconds."""
    return datetime.fromisoformat(event["time"])
