"""Output folders of commands that write a model: a new model folder that becomes visible when it is complete."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bam_ray.blobs import BlobStore, open_store
from bam_ray.blobs.check import open_checked_store
from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.leases import holder
from bam_ray.checkpoint.manifest import MANIFEST, read_manifest
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import BlobExists, CheckpointError, StoreError, StoreUnavailable, one_line
from bam_ray.settings import StoreSettings

RESERVATION = ".bam-writing"


@contextmanager
def new_model_folder(out: StoreSettings) -> Iterator[ModelWriter]:
    """Yield the writer of a model folder, which becomes `out` when the block ends without an exception.

    On a file system the folder is written under a temporary name next to `out` and then renamed. On S3 files appear as
    they are written, the configuration and the manifest last. The blob `.bam-writing` keeps other commands away in the
    meantime. If the block raises, the files that it wrote are removed, and no others.

    Args:
        out: A path or an `s3://` URI at which nothing exists yet.

    Raises:
        CheckpointError: `out` exists and is not an empty folder, or another command writes to it.
        NoConditionalPut: The store does not give the promise that `out` asks for.
    """
    store = open_store(out.uri, out.endpoint)
    if isinstance(store, FolderStore):
        with _renamed_when_complete(Path(store.uri), out.uri) as partial:
            yield ModelWriter(FolderStore(partial))
        return
    _check_empty(store, out.uri)
    store, _ = open_checked_store(out)
    with _reserved(store, out.uri):
        writer = ModelWriter(store)
        try:
            yield writer
        except BaseException as error:
            _undo(writer, out.uri, error)
            raise


def _check_empty(store: BlobStore, uri: str) -> None:
    """Raise `CheckpointError` if anything is at `uri` besides the reservation."""
    keys = [key for key in store.list() if key != RESERVATION]
    if keys:
        partial = "" if "config.json" in keys else " and has no model, perhaps left by an interrupted command"
        raise CheckpointError(f"{uri} is not empty{partial}: name a new location or delete its contents")


@contextmanager
def _reserved(store: BlobStore, uri: str) -> Iterator[None]:
    """Keep other commands from writing to the same location; raise `CheckpointError` if one does."""
    try:
        store.put_if_absent(RESERVATION, holder())
    except BlobExists:
        raise CheckpointError(
            f"another command writes to {uri}: wait for it, or delete {uri}/{RESERVATION} if it is gone"
        ) from None
    try:
        _check_empty(store, uri)  # another command may have finished between the first look and the reservation
        yield
    finally:
        with suppress(StoreError):
            store.delete(RESERVATION)


def _undo(writer: ModelWriter, uri: str, cause: BaseException) -> None:
    """Delete what the writer wrote, unless there is a manifest or the store does not say so."""
    try:
        committed = read_manifest(writer.store, writer.prefix) is not None
        if not committed:
            for key in writer.started:
                writer.store.delete(key)
    except StoreError as error:
        raise CheckpointError(
            f"{one_line(cause)}; {uri} was not cleaned up, because the store failed ({one_line(error)}): if it has a "
            f"{MANIFEST}, it is complete, otherwise delete its contents"
        ) from cause


@contextmanager
def _renamed_when_complete(folder: Path, uri: str) -> Iterator[Path]:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"{uri} is not empty: name a new location or delete its contents")
    partial = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        if folder.is_dir():
            folder.rmdir()
        try:
            partial.rename(folder)
        except OSError:  # another command has made it in the meantime
            raise CheckpointError(f"{uri} is not empty any more: name a new location") from None
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
