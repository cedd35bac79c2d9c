"""Leases of attempts that no controller has numbered."""

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.leases import AttemptNumber, Lease, take_epoch


def next_lease(store: BlobStore, prefix: str) -> Lease:
    """Take the lease of a new attempt, which is newer than all earlier ones."""
    return Lease.take(store, prefix, AttemptNumber(take_epoch(store), 1))
