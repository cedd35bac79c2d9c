"""A new model folder, visible when it is whole: a folder is made beside its place and moved there in one step."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bam_ray.blobs import BlobStore, open_store
from bam_ray.blobs.check import open_checked_store
from bam_ray.blobs.folder import FolderStore
from bam_ray.errors import CheckpointError, StoreUnavailable
from bam_ray.settings import StoreSettings


@contextmanager
def new_folder(out: StoreSettings) -> Iterator[BlobStore]:
    """A store to write a model folder to, which is to lie at `out` (a path or s3://) when the block ends well.

    Raises `CheckpointError` where something lies there already, `NoConditionalPut` where the store does not promise
    what is asked of it. Where the block fails, nothing is left. On S3 files appear as they are written, the
    configuration and the manifest last.
    """
    store = open_store(out.uri, out.endpoint)
    place = Path(store.uri) if isinstance(store, FolderStore) else None
    if (place is not None and place.is_file()) or any(True for _ in store.list()):
        left = "" if place is not None or store.exists("config.json") else " (no model: left by what was interrupted?)"
        raise CheckpointError(
            f"{out.uri} is not empty{left}: name a place where nothing lies yet, or delete what is there"
        )
    if place is None:
        store, _ = open_checked_store(out)
        try:
            yield store
        except BaseException:
            for key in store.list():
                store.delete(key)
            raise
        return
    partial = place.with_name(f".{place.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        yield FolderStore(partial)
        if place.is_dir():
            place.rmdir()
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_space(uri: str, needed: int) -> None:
    """Raise `StoreUnavailable` where `uri` is a folder on a disk with less than `needed` bytes free."""
    store = open_store(uri)
    if not isinstance(store, FolderStore):
        return
    place = Path(store.uri)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StoreUnavailable(
            f"{uri} needs {needed / 1e9:.2f} GB but its disk has {free / 1e9:.2f} GB free: make room or write elsewhere"
        )
