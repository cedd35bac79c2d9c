"""Artifacts in the blob store: published files first and manifest last, and verified when fetched.

Problem: the models and corpora of a run are folders of large files. A process may die in the middle of an upload, two
attempts may upload the same artifact at once, and a blob may be damaged. No task may ever start from such a folder.

Design choice: `publish` uploads every file and then commits the manifest, which holds the digest of each file. `fetch`
downloads into a temporary folder, compares every file with its digest, and renames the folder. A local cache keeps
fetched folders, one per store and manifest.

Limits: files of a publication that was interrupted stay in the store until the next attempt overwrites them. The cache
is never pruned; `BAM_CACHE` names its folder.

Example:
    store = open_store("s3://bam/demo")
    artifact = Artifact(store, ArtifactKind.BRANCHES, "code-1f2e3d4c5b6a")
    artifact.publish(folder, manifest)          # uploads, computes digests, commits
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
from bam_ray.checkpoint.manifest import MANIFEST, ArtifactKind, FileEntry, Manifest
from bam_ray.errors import BlobExists, BlobNotFound, CheckpointError, DigestMismatch, StoreError


class Artifact:
    """One artifact of a store, at the prefix `<kind>/<id>` or at a prefix below it.

    Args:
        store: The store that holds or will hold the artifact.
        kind: The first part of the prefix.
        id: The identity of the artifact (see `manifest.identity`).
        below: Further parts of the prefix, for a training checkpoint of the artifact.
    """

    def __init__(self, store: BlobStore, kind: ArtifactKind, id: str, *below: str) -> None:
        self.store = store
        self.kind = kind
        self.id = id
        self.prefix = "/".join([kind, id, *below])

    @property
    def uri(self) -> str:
        """The full URI of the artifact, for messages."""
        return f"{self.store.uri}/{self.prefix}"

    def manifest(self) -> Manifest | None:
        """Return the manifest, or None if the artifact is not committed."""
        try:
            return Manifest.from_bytes(self.store.get(f"{self.prefix}/{MANIFEST}"), self.uri)
        except BlobNotFound:
            return None

    def publish(self, folder: Path, manifest: Manifest, check: Callable[[], None] = lambda: None) -> Manifest:
        """Upload every file of `folder`, then commit `manifest` with their digests.

        Args:
            folder: The files to upload.
            manifest: The manifest to commit; its `files` are replaced.
            check: A function that raises if this attempt may not write any more. It is called before each file and
                before the manifest, so that an attempt that lost its network in the middle of an upload does not
                continue and overwrite what a newer attempt has written since.

        Returns:
            The committed manifest. If another attempt committed first, it is theirs and ours is dropped, because the
            same identity means the same content.
        """
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        entries = {name: file_entry(folder / name) for name in names}

        def upload(name: str) -> None:
            check()
            self.store.put_file(f"{self.prefix}/{name}", folder / name)

        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(upload, names))
        check()
        return self.commit(manifest.model_copy(update={"files": entries}))

    def commit(self, manifest: Manifest) -> Manifest:
        """Write the manifest, which marks the artifact as complete, and return the one that was committed first."""
        try:
            self.store.put_if_absent(f"{self.prefix}/{MANIFEST}", manifest.to_bytes())
        except BlobExists:
            theirs = self.manifest()
            assert theirs is not None
            return theirs
        return manifest

    def fetch(self, cache: Path | None = None) -> Path:
        """Download and verify all files and return their folder in the local cache.

        A folder that was fetched before is returned at once. If several processes share a cache, as the ranks of a node
        do, one of them downloads and the others wait.

        Args:
            cache: The folder of the cache; the default is `cache_folder()`.

        Raises:
            CheckpointError: The artifact is not committed.
            DigestMismatch: A file differs from what was committed.
            StoreError: The disk of the cache has too little space, which says nothing about the artifact.
        """
        manifest = self.manifest()
        if manifest is None:
            raise CheckpointError(f"{self.uri} is not committed (it has no {MANIFEST}): run the stage that makes it")
        # The manifest is part of the cache key, because a store that was wiped and filled again has another artifact
        digest = hashlib.sha256(self.store.uri.encode() + manifest.to_bytes()).hexdigest()[:16]
        target = (cache or cache_folder()) / digest
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(target.with_name(f".{digest}.lock")):
            if not target.is_dir():
                self._download(manifest, target)
        return target

    def _download(self, manifest: Manifest, target: Path) -> None:
        needed, free = sum(entry.size for entry in manifest.files.values()), shutil.disk_usage(target.parent).free
        if needed > free:
            raise StoreError(
                f"{target.parent} has {free:,} bytes free but {self.uri} needs {needed:,}: free space or set BAM_CACHE"
            )
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
        try:
            for name, entry in manifest.files.items():
                path = partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self.store.get_file(f"{self.prefix}/{name}", path)
                if file_entry(path) != entry:
                    raise DigestMismatch(f"{self.uri}/{name} does not match its manifest: the blob was damaged")
            with contextlib.suppress(OSError):  # without locks another process may be first; both copies are equal
                partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; the system releases it if the process dies.

    On a file system without locks, nobody waits. The file is not removed afterwards, because a new file of the same
    name would be a different lock.
    """
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_entry(path: Path) -> FileEntry:
    """Compute the length and the SHA-256 digest of a file."""
    with path.open("rb") as file:
        return FileEntry(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def cache_folder() -> Path:
    """Return the folder for fetched artifacts: `$BAM_CACHE`, by default `~/.cache/bam_ray`."""
    return Path(os.environ.get("BAM_CACHE") or "~/.cache/bam_ray").expanduser()
