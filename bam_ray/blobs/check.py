"""A check, before a store is used, that its `put_if_absent` is atomic.

Commits and leases rely on `put_if_absent` being atomic. S3 servers implement it with a condition on the put
(`If-None-Match`), which some servers ignore and others refuse. Some test the condition first and write afterwards, so
that of several writers at the same moment more than one succeeds; the check therefore also lets writers race. Such a
store is refused by default. With `store.promise: weak` it is used by checking whether the key exists and then putting.
Two writers that do so at the same moment both believe that they were first.
"""

import contextlib
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

from bam_ray.blobs import open_store
from bam_ray.blobs.patience import Report, retry_on
from bam_ray.blobs.store import BlobStore, put_once
from bam_ray.errors import BlobExists, NoConditionalPut, StoreBusy, StoreError
from bam_ray.settings import StoreSettings

RACERS = 8
RACES = 4


def open_checked_store(settings: StoreSettings, report: Report | None = None) -> tuple[BlobStore, str | None]:
    """Open the store of `settings` and check that its conditional puts work.

    A server that answers that it is busy is asked again, see `retry_on`. All other errors are raised at once.

    Args:
        settings: The store.
        report: Called with one line before each further attempt.

    Returns:
        The store, and a one-line warning if it gives only the weak promise.

    Raises:
        NoConditionalPut: The store has no conditional puts and `store.promise` is "strict".
        StoreError: Any error of the store itself.
    """
    store = open_store(settings.uri, settings.endpoint)
    try:
        retry_on(StoreBusy, report)(check_put_if_absent, store)
    except NoConditionalPut as error:
        if settings.promise == "strict":
            raise NoConditionalPut(
                f"{error}, so two attempts could both commit: use a server that supports If-None-Match (AWS, Ceph, "
                "SeaweedFS after 4.16) or a folder, or accept this with store.promise=weak in a recipe or --weak-store "
                "on the command line"
            ) from None
        warning = (
            f"{error} (store.promise: weak): a commit only checks first whether another one exists, so two commits at "
            "the same moment may both appear to succeed"
        )
        return open_store(settings.uri, settings.endpoint, settings.promise), warning
    return store, None


def check_put_if_absent(store: BlobStore) -> None:
    """Write probe blobs, one after the other and by racing writers; raise `NoConditionalPut` unless one put wins."""
    prefix = f"probes/{uuid.uuid4().hex}"
    _check_order(store, f"{prefix}-order")
    with ThreadPoolExecutor(RACERS, thread_name_prefix="probe") as pool:
        for number in range(RACES):
            _check_race(store, f"{prefix}-race-{number}", pool)


def _check_order(store: BlobStore, key: str) -> None:
    """Raise `NoConditionalPut` unless the second of two puts is refused."""
    with _probe(store, key):
        put_once(store, key, b"first")
        if store.get(key) != b"first":
            raise StoreError(
                f"the store at {store.uri} returns other bytes than were written: use another server, or set "
                "AWS_REQUEST_CHECKSUM_CALCULATION to when_required for a server that stores checksums within the data"
            )
        try:
            store.put_if_absent(key, b"second")
        except BlobExists:
            if store.get(key) == b"first":
                return
        raise NoConditionalPut(f"the store at {store.uri} silently overwrites on a conditional put")


def _check_race(store: BlobStore, key: str, pool: ThreadPoolExecutor) -> None:
    """Raise `NoConditionalPut` if more than one of the writers that put at the same moment succeeds.

    If the answer to the winner is lost, it may seem that no writer has succeeded.
    """
    barrier = threading.Barrier(RACERS)

    def put(racer: int) -> bool:
        barrier.wait()
        try:
            store.put_if_absent(key, _racer(racer))
        except BlobExists:
            return False
        return True

    with _probe(store, key):
        puts = [pool.submit(put, racer) for racer in range(RACERS)]
        wait(puts)  # so that no put comes after the probe was deleted
        winners = [racer for racer, future in enumerate(puts) if future.result()]
        if winners and (len(winners) > 1 or store.get(key) != _racer(winners[0])):
            raise NoConditionalPut(f"the store at {store.uri} has conditional puts that are not atomic")


def _racer(number: int) -> bytes:
    return f"racer {number}".encode()


@contextlib.contextmanager
def _probe(store: BlobStore, key: str) -> Iterator[None]:
    """Delete the blob `key` at the end."""
    try:
        yield
    finally:
        with contextlib.suppress(StoreError):  # a writer may lack the permission to delete
            store.delete(key)
