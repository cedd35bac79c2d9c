"""Artifacts in and out of the blob store: files first, manifest last; verified when read.

store = open_store("s3://bam/demo")
artifact = Artifact(store, "branches", "code-1f2e3d4c5b6a")
artifact.publish(folder, manifest)          # uploads, digests, commits
local = artifact.fetch(cache)               # downloads, verifies, returns a folder
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import MANIFEST, FileEntry, Kind, Manifest
from bam_ray.errors import BlobExists, BlobNotFound, CheckpointError, DigestMismatch, StoreError


class Artifact:
    """One artifact's place in a store: `<kind>/<id>/`, or any prefix below it."""

    def __init__(self, store: BlobStore, kind: Kind, id: str, *below: str) -> None:
        self.store = store
        self.kind: Kind = kind
        self.id = id
        self.prefix = "/".join([kind, id, *below])

    @property
    def uri(self) -> str:
        """Where it lies, for people."""
        return f"{self.store.uri}/{self.prefix}"

    def manifest(self) -> Manifest | None:
        """Its manifest, or None where it is not committed."""
        try:
            return Manifest.from_bytes(self.store.get(f"{self.prefix}/{MANIFEST}"), self.uri)
        except BlobNotFound:
            return None

    def publish(self, folder: Path, manifest: Manifest, check: Callable[[], None] = lambda: None) -> Manifest:
        """Upload every file of `folder`, then commit `manifest` with their digests.

        Where the artifact was committed meanwhile (another attempt won), theirs is returned and ours is dropped:
        the same identity means the same content.

        `check` raises where this attempt may not write any more. It is asked before each file and before the manifest:
        one that was cut off in the middle of an upload must not go on with it over what another has made since.
        """
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        entries = {name: file_entry(folder / name) for name in names}

        def put(name: str) -> None:
            check()
            self.store.put_file(f"{self.prefix}/{name}", folder / name)

        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(put, names))
        check()
        return self.commit(manifest.model_copy(update={"files": entries}))

    def commit(self, manifest: Manifest) -> Manifest:
        """Write the manifest, the mark that the artifact is whole; the first of racing writers wins."""
        try:
            self.store.put_if_absent(f"{self.prefix}/{MANIFEST}", manifest.to_bytes())
        except BlobExists:
            theirs = self.manifest()
            assert theirs is not None
            return theirs
        return manifest

    def fetch(self, cache: Path | None = None) -> Path:
        """Download and verify all files into a folder of the local cache; a folder fetched before is returned as is.

        Of several processes that share a cache, as the ranks of a node do, one downloads and the others wait for it.

        Raises `CheckpointError` where it is not committed, `DigestMismatch` where a file is not what was committed, and
        `StoreError` where the cache has no room for it: that says nothing of the artifact.
        """
        manifest = self.manifest()
        if manifest is None:
            raise CheckpointError(f"{self.uri} is not committed (it has no {MANIFEST}): run the stage that makes it")
        # The manifest's own digest is part of the place: a store that was wiped and filled anew is another artifact
        digest = hashlib.sha256(self.store.uri.encode() + manifest.to_bytes()).hexdigest()[:16]
        target = (cache or cache_folder()) / digest
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_here(target.with_name(f".{digest}.lock")):
            if not target.is_dir():
                self._download(manifest, target)
        return target

    def _download(self, manifest: Manifest, target: Path) -> None:
        needed, free = sum(entry.size for entry in manifest.files.values()), shutil.disk_usage(target.parent).free
        if needed > free:
            raise StoreError(
                f"{target.parent} has {free:,} bytes left, {self.uri} takes {needed:,}: make room or set BAM_CACHE"
            )
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
        try:
            for name, entry in manifest.files.items():
                path = partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self.store.get_file(f"{self.prefix}/{name}", path)
                if file_entry(path) != entry:
                    raise DigestMismatch(f"{self.uri}/{name} is not what its manifest says: the blob was damaged")
            with contextlib.suppress(OSError):  # another that could not be waited for was first: either copy is right
                partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def only_here(lock: Path) -> Iterator[None]:
    """Hold the file `lock`, waiting for whoever holds it; who dies lets go of it.

    Where a file system knows no locks, nobody waits. The file stays: another one of its name would be another lock.
    """
    with lock.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_entry(path: Path) -> FileEntry:
    """Length and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileEntry(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def cache_folder() -> Path:
    """Where fetched artifacts are kept: `$BAM_CACHE`, else `~/.cache/bam_ray`."""
    return Path(os.environ.get("BAM_CACHE") or "~/.cache/bam_ray").expanduser()
