"""Remove from the store of a run what killed attempts and drivers have left.

Problem: an attempt may be killed while it uploads a model or a checkpoint. Most of its files are deleted by the next
attempt, but those of the last attempt and of abandoned tasks stay, and so do unfinished multipart uploads.

Design choice: a file is removed only if nobody can need it any more. That is decided for each artifact from its
manifests and its leases, and never from the age of a file. An attempt that is stale but still alive could be about to
commit, so its folder is claimed before it is deleted (see `Artifact.claim_to_sweep`).

Limits: the files of the newest attempt at an artifact that is not committed stay, because nobody knows whether it still
runs. Evaluations without a lease stay until they are committed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.artifacts import CLAIM, FILES, Artifact, delete_keys, folder_number
from bam_ray.checkpoint.leases import AttemptNumber, epoch_key, newest_attempt
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest, is_manifest
from bam_ray.control.drivers import KnownDriver, heartbeat_key, known_drivers
from bam_ray.errors import BlobNotFound, StoreDenied

STEPS = "steps"
KEPT = timedelta(days=1)  # uploads, and epochs of drivers that are gone, are removed after this time


@dataclass(frozen=True)
class Removed:
    """A group of blobs that was removed, or that would be.

    Attributes:
        what: Their common prefix.
        why: Why they were not needed.
        blobs: Their number.
        bytes: Their size.
    """

    what: str
    why: str
    blobs: int
    bytes: int


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        removed: What was removed.
        uploads: The keys of the unfinished uploads that were removed.
        living: The drivers that were alive.
        denied: Why unfinished uploads could not be removed; empty if the store did not deny that.
    """

    removed: tuple[Removed, ...]
    uploads: tuple[str, ...]
    living: tuple[str, ...]
    denied: str = ""


@dataclass(frozen=True)
class _Garbage:
    """Blobs that nobody needs: those that begin with `prefix`, or a single one.

    `claim` must return True before they are deleted.
    """

    prefix: str
    why: str
    keys: tuple[str, ...]
    claim: Callable[[], bool] = lambda: True


def sweep(store: BlobStore, dry_run: bool = False) -> SweepResult:
    """Remove what killed attempts and drivers have left in the store of a run.

    Args:
        store: The store.
        dry_run: Remove nothing; the result is what would be removed, without unfinished uploads.
    """
    drivers = known_drivers(store)
    living = tuple(str(driver) for driver in drivers if driver.alive)
    removed: list[Removed] = []
    for artifact in _artifacts(store):
        removed += _remove(store, _of_artifact(artifact, bool(living)), dry_run)
    removed += _remove(store, _of_drivers(store, drivers), dry_run)
    uploads: list[str] = []
    denied = ""
    if not dry_run:
        try:
            for kind in ArtifactKind:
                uploads += store.abort_uploads(f"{kind}/", KEPT)
        except StoreDenied as error:  # listing uploads is a permission of its own
            denied = str(error)
    return SweepResult(tuple(removed), tuple(uploads), living, denied)


def _artifacts(store: BlobStore) -> Iterator[Artifact]:
    for kind in ArtifactKind:
        for id in sorted({key.split("/")[1] for key in store.list(f"{kind}/")}):
            yield Artifact(store, kind, id)


def _of_artifact(artifact: Artifact, others_alive: bool) -> Iterator[_Garbage]:
    """Yield what nobody needs of an artifact.

    The order of the requests matters. A folder that is listed before the newest lease is read belongs to that attempt
    or to an earlier one.
    """
    folders = _group(artifact, FILES)
    checkpoints = _group(artifact, STEPS)
    newest = newest_attempt(artifact.store, artifact.prefix)
    manifest = artifact.manifest()
    committed_by = _number(manifest.folder, folder_number) if manifest else None
    # The newest attempt has ended if it is the one that committed. Another one may still run if a driver is alive.
    over = manifest is not None and (newest in (None, committed_by) or not others_alive)
    if newest is None:
        over = over and not others_alive  # several processes may evaluate a model without a lease
    for name, keys in folders.items():
        number = _number(f"{FILES}/{name}", folder_number)
        folder = f"{FILES}/{name}"
        if number is None or (manifest is not None and folder == manifest.folder):
            continue
        if manifest is not None and (over or _is_older(number, newest)):
            yield _Garbage(f"{artifact.prefix}/{folder}/", "another attempt has committed", keys)
        elif manifest is None and _is_older(number, newest):
            claim = _claim(artifact, folder)
            keys = tuple(key for key in keys if not key.endswith(f"/{CLAIM}"))
            yield _Garbage(f"{artifact.prefix}/{folder}/", "a newer attempt has taken over", keys, claim)
    yield from _of_checkpoints(artifact, checkpoints, manifest if over else None, newest)


def _of_checkpoints(
    artifact: Artifact, checkpoints: dict[str, tuple[str, ...]], manifest: Manifest | None, newest: AttemptNumber | None
) -> Iterator[_Garbage]:
    """Yield the checkpoints that nobody needs; `manifest` is that of the artifact if no attempt at it runs any more."""
    for name, keys in checkpoints.items():
        number = _number(name, AttemptNumber.parse)
        if number is None:
            continue
        prefix = f"{artifact.prefix}/{STEPS}/{name}/"
        if not any(is_manifest(key) for key in keys):
            if manifest is not None or _is_older(number, newest):
                yield _Garbage(prefix, "its upload was not finished", keys)
        elif manifest is not None and not _is_kept(name, manifest):
            yield _Garbage(prefix, "its artifact is committed", keys)


def _is_kept(checkpoint: str, manifest: Manifest) -> bool:
    """Return True if the settings of the artifact keep a checkpoint after its end, or if they are not known."""
    training = manifest.settings.get("training")
    if not isinstance(training, dict):
        return True
    every = training.get("keep_every")
    return every is not None and int(checkpoint.rpartition("-")[2]) % every == 0


def _of_drivers(store: BlobStore, drivers: Iterable[KnownDriver]) -> Iterator[_Garbage]:
    """Yield the epochs and heartbeats of drivers that have been gone for long; the newest epoch numbers the next."""
    listed = list(drivers)
    newest = max((epoch for driver in listed for epoch in driver.epochs), default=0)
    for driver in listed:
        if driver.alive or newest in driver.epochs or not _is_old(driver):
            continue
        keys = [epoch_key(epoch) for epoch in driver.epochs]
        if store.exists(heartbeat_key(driver.token)):
            keys.append(heartbeat_key(driver.token))
        yield _Garbage(keys[0], f"{driver} is gone", tuple(keys))


def _is_old(driver: KnownDriver) -> bool:
    try:
        taken = datetime.fromisoformat(driver.description["taken"])
    except (KeyError, TypeError, ValueError):
        return False
    return datetime.now(UTC) - taken > KEPT


def _group(artifact: Artifact, part: str) -> dict[str, tuple[str, ...]]:
    """Return the keys below `<artifact>/<part>/<name>/` by name."""
    start = f"{artifact.prefix}/{part}/"
    groups: dict[str, list[str]] = {}
    for key in artifact.store.list(start):
        name, separator, _ = key.removeprefix(start).partition("/")
        if separator:
            groups.setdefault(name, []).append(key)
    return {name: tuple(keys) for name, keys in groups.items()}


def _number(name: str, parse: Callable[[str], AttemptNumber]) -> AttemptNumber | None:
    """Return the number of the attempt that a folder is named after; None for a folder of something else."""
    with contextlib.suppress(ValueError):
        return parse(name)
    return None


def _is_older(number: AttemptNumber, newest: AttemptNumber | None) -> bool:
    return newest is not None and number < newest


def _claim(artifact: Artifact, folder: str) -> Callable[[], bool]:
    return lambda: artifact.claim_to_sweep(folder)


def _remove(store: BlobStore, groups: Iterable[_Garbage], dry_run: bool) -> Iterator[Removed]:
    """Delete groups of blobs, and yield those that were deleted."""
    for garbage in groups:
        if garbage.keys and (dry_run or garbage.claim()):
            size = _size(store, garbage.keys)
            if not dry_run:
                delete_keys(store, garbage.keys)
            yield Removed(garbage.prefix.rstrip("/"), garbage.why, len(garbage.keys), size)


def _size(store: BlobStore, keys: Iterable[str]) -> int:
    def size(key: str) -> int:
        try:
            return store.size(key)
        except BlobNotFound:  # another process deletes it too
            return 0

    with ThreadPoolExecutor(max_workers=8) as pool:
        return sum(pool.map(size, keys))
