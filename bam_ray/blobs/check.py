"""A check, before a store is used, that its `put_if_absent` is atomic.

Commits and leases rely on `put_if_absent` being atomic. S3 servers implement it with a condition on the put
(`If-None-Match`), which some servers ignore and others refuse. Such a store is refused by default. With
`store.promise: weak` it is used by checking whether the key exists and then putting. Two writers that do so at the
same moment both believe that they were first.
"""

import contextlib
import uuid

from bam_ray.blobs import open_store
from bam_ray.blobs.store import BlobStore
from bam_ray.errors import BlobExists, BlobNotFound, NoConditionalPut, StoreDenied
from bam_ray.settings import StoreSettings


def open_checked_store(settings: StoreSettings) -> tuple[BlobStore, str | None]:
    """Open the store of `settings` and check that its conditional puts work.

    Returns:
        The store, and a one-line warning if it gives only the weak promise.

    Raises:
        NoConditionalPut: The store has no conditional puts and `store.promise` is "strict".
        StoreError: Any error of the store itself.
    """
    store = open_store(settings.uri, settings.endpoint)
    try:
        check_put_if_absent(store)
    except NoConditionalPut as error:
        if settings.promise == "strict":
            raise NoConditionalPut(
                f"{error}, so two attempts could both commit: use a server that supports If-None-Match (AWS, "
                "SeaweedFS, Ceph) or a folder, or accept this with store.promise=weak in a recipe or --weak-store on "
                "the command line"
            ) from None
        warning = (
            f"{error} (store.promise: weak): a commit only checks first whether another one exists, so two commits at "
            "the same moment may both appear to succeed"
        )
        return open_store(settings.uri, settings.endpoint, settings.promise), warning
    return store, None


def check_put_if_absent(store: BlobStore) -> None:
    """Write a probe blob twice; raise `NoConditionalPut` unless the second put is refused."""
    key = f"probes/{uuid.uuid4().hex}"
    try:
        store.put_if_absent(key, b"first")
        try:
            store.put_if_absent(key, b"second")
        except BlobExists:
            if store.get(key) == b"first":
                return
        raise NoConditionalPut(f"the store at {store.uri} silently overwrites on a conditional put")
    finally:
        with contextlib.suppress(BlobNotFound, StoreDenied):  # a writer may lack the permission to delete
            store.delete(key)
