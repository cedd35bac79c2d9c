"""Blob stores: `open_store(uri)` opens a folder, an S3 bucket or memory behind one interface."""

from bam_ray.blobs.folder import FolderStore
from bam_ray.blobs.memory import MemoryStore
from bam_ray.blobs.store import BlobStore, Promise, put_once
from bam_ray.errors import SettingsError

__all__ = ["BlobStore", "Promise", "open_store", "put_once"]


def open_store(uri: str, endpoint: str | None = None, promise: Promise = "strict") -> BlobStore:
    """Open the store at `uri` without contacting it; the first operation does.

    Args:
        uri: `s3://bucket/prefix`, `memory://name`, `file:///folder` or a plain path.
        endpoint: The URL of an S3 server other than AWS. Credentials come only from the environment (`AWS_*`).
        promise: The guarantee that `put_if_absent` gives on S3. "weak" is for servers without conditional puts;
            `open_checked_store` chooses it if a server needs it and the settings allow it.

    Raises:
        SettingsError: The URI has an unknown scheme or names no bucket.
    """
    scheme, separator, rest = uri.rstrip("/").partition("://")
    if not separator:
        return FolderStore(uri)
    if scheme == "file":
        return FolderStore(rest)
    if scheme == "memory":
        return MemoryStore.named(rest)
    if scheme == "s3":
        from bam_ray.blobs.s3 import S3Store  # imports boto3, which takes a second and only S3 needs

        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise SettingsError(f"store {uri!r} names no bucket: write s3://BUCKET/PREFIX")
        return S3Store(bucket, prefix, endpoint, promise)
    raise SettingsError(f"store {uri!r} has an unknown scheme {scheme!r}: use s3://, file:// or a path")
