"""Blob stores: `open_store(uri)` gives a folder, an S3 bucket or memory behind one protocol."""

from bam_ray.blobs.folder import FolderStore
from bam_ray.blobs.memory import MemoryStore
from bam_ray.blobs.store import BlobStore
from bam_ray.errors import SettingsError

__all__ = ["BlobStore", "open_store"]


def open_store(uri: str, endpoint: str | None = None, conditional_puts: bool = True) -> BlobStore:
    """Open the store at `uri`: `s3://bucket/prefix`, `memory://name`, `file:///folder` or a plain path.

    `endpoint` is the URL of an S3 server other than AWS; credentials come from the environment (`AWS_*`) alone.
    Nothing is contacted until the first operation. Without `conditional_puts` an S3 store looks, then puts, where it is
    to put a key that is absent: not atomic, for servers that have nothing better (`checked_store` finds out).
    """
    scheme, separator, rest = uri.rstrip("/").partition("://")
    if not separator:
        return FolderStore(uri)
    if scheme == "file":
        return FolderStore(rest)
    if scheme == "memory":
        return MemoryStore.named(rest)
    if scheme == "s3":
        from bam_ray.blobs.s3 import S3Store

        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise SettingsError(f"store {uri!r} names no bucket: write s3://BUCKET/PREFIX")
        return S3Store(bucket, prefix, endpoint, conditional_puts)
    raise SettingsError(f"store {uri!r} has an unknown scheme {scheme!r}: use s3://, file:// or a path")
