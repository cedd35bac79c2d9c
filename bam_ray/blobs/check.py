"""A look at a store before it is trusted: does it keep the one promise that everything here rests on?

Commits and leases rest on `put_if_absent` being atomic. S3 servers do it by a condition on the put (`If-None-Match`),
which some ignore and some refuse. Such a store is refused, or, with `store.promise: weak`, used by looking whether the
key is there and then putting: two writers that do so at the same moment both believe that they were first.
"""

import contextlib
import uuid

from bam_ray.blobs import open_store
from bam_ray.blobs.store import BlobStore
from bam_ray.errors import BlobExists, BlobNotFound, NoConditionalPut, StoreDenied
from bam_ray.settings import StoreSettings


def checked_store(settings: StoreSettings) -> tuple[BlobStore, str | None]:
    """The store, and one line about what it promises less, where it does.

    Raises `NoConditionalPut` where it does and `store.promise` is `strict`, and what the store itself raises.
    """
    store = open_store(settings.uri, settings.endpoint)
    try:
        check_put_if_absent(store)
    except NoConditionalPut as error:
        if settings.promise == "strict":
            raise NoConditionalPut(
                f"{error}, so two attempts could both commit: use a server that honours If-None-Match (AWS, SeaweedFS, "
                "Ceph) or a folder, or accept that with store.promise=weak in a recipe, --weak-store on a command line"
            ) from None
        weaker = "a commit only looks first whether another is there: two at the same moment may both think they won"
        return open_store(
            settings.uri, settings.endpoint, conditional_puts=False
        ), f"{error} (store.promise: weak): {weaker}"
    return store, None


def check_put_if_absent(store: BlobStore) -> None:
    """Write a probe twice; raises `NoConditionalPut` where the second put is not refused, or where none is possible."""
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
        with contextlib.suppress(BlobNotFound, StoreDenied):  # a writer may lack the right to delete
            store.delete(key)
