"""A look at a store before it is trusted: does it keep the one promise that everything here rests on?"""

import contextlib
import uuid

from bam_ray.blobs.store import BlobStore
from bam_ray.errors import BlobExists, BlobNotFound, StoreDenied, StoreError


def check_put_if_absent(store: BlobStore) -> None:
    """Write a probe twice; raises `StoreError` where the second put is not refused, and what the store itself raises.

    Some S3 servers ignore the condition of a put (`If-None-Match: *`): two attempts at one artifact would then both
    believe that they made it.
    """
    key = f"probes/{uuid.uuid4().hex}"
    try:
        store.put_if_absent(key, b"first")
        try:
            store.put_if_absent(key, b"second")
        except BlobExists:
            if store.get(key) == b"first":
                return
        raise StoreError(
            f"the store at {store.uri} silently overwrites on a conditional put, so two attempts could both commit: "
            "use a server that honours If-None-Match (AWS, SeaweedFS, Ceph) or a folder"
        )
    finally:
        with contextlib.suppress(BlobNotFound, StoreDenied):  # a writer may lack the right to delete
            store.delete(key)
