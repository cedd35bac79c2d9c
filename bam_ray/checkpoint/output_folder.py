"""Output folders of commands that write a model: a new model folder that becomes visible when it is complete."""

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
def new_model_folder(out: StoreSettings) -> Iterator[BlobStore]:
    """Yield a store to write a model folder to, which becomes `out` when the block ends without an exception.

    On a file system the folder is written under a temporary name next to `out` and then renamed. On S3 files appear as
    they are written, the configuration and the manifest last. If the block raises, everything that it wrote is removed.

    Args:
        out: A path or an `s3://` URI at which nothing exists yet.

    Raises:
        CheckpointError: `out` exists and is not an empty folder.
        NoConditionalPut: The store does not give the promise that `out` asks for.
    """
    store = open_store(out.uri, out.endpoint)
    folder = Path(store.uri) if isinstance(store, FolderStore) else None
    if (folder is not None and folder.is_file()) or any(True for _ in store.list()):
        partial_hint = (
            " and has no model, perhaps left by an interrupted command"
            if folder is None and not store.exists("config.json")
            else ""
        )
        raise CheckpointError(f"{out.uri} is not empty{partial_hint}: name a new location or delete its contents")
    if folder is not None:
        with _renamed_when_complete(folder) as partial:
            yield FolderStore(partial)
        return
    store, _ = open_checked_store(out)
    try:
        yield store
    except BaseException:
        for key in store.list():
            store.delete(key)
        raise


@contextmanager
def _renamed_when_complete(folder: Path) -> Iterator[Path]:
    partial = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_disk_space(uri: str, needed: int) -> None:
    """Raise `StoreUnavailable` if `uri` is a folder on a disk with less than `needed` bytes free."""
    store = open_store(uri)
    if not isinstance(store, FolderStore):
        return
    existing = Path(store.uri)
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StoreUnavailable(
            f"{uri} needs {needed / 1e9:.2f} GB but its disk has {free / 1e9:.2f} GB free: free space or write to "
            "another location"
        )
