"""Artifacts in the blob store: files first and manifest last, and verified when fetched.

Problem: the models and corpora of a run are folders of large files. A process may die in the middle of an upload, two
attempts may upload the same artifact at once, and a blob may be damaged. No task may ever start from such a folder.

Design choice: every attempt uploads to a folder of its own, `files/<attempt>-<random>`. The manifest is committed last,
by a conditional put. It names that folder and holds the digest of each file. So no write of one attempt, however late,
can change what another one has committed. Manifests are never changed or deleted either: if the committed files turn
out to be damaged, a mark is put beside the manifest, and the artifact is made again as the next generation.

`fetch` downloads into a temporary folder, compares every file with its digest, and renames the folder (see `cache`).

Example:
    store = open_store("s3://bam/demo")
    artifact = Artifact(store, ArtifactKind.BRANCHES, "code-1f2e3d4c5b6a")
    artifact.publish(folder, manifest, lease)   # uploads, computes digests, commits
    local = artifact.fetch()                    # downloads, verifies, returns a folder
"""

import contextlib
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bam_ray.blobs import BlobStore, put_once
from bam_ray.checkpoint.cache import cached_folder
from bam_ray.checkpoint.digests import check_digests, file_entry, mismatch, missing
from bam_ray.checkpoint.leases import AttemptNumber, Lease
from bam_ray.checkpoint.manifest import (
    MANIFEST,
    ArtifactKind,
    FileEntry,
    Manifest,
    ManifestGeneration,
    is_manifest,
    read_manifest,
)
from bam_ray.errors import BlobExists, BlobNotFound, CheckpointError, DigestMismatch, StaleLease, StoreError

FILES = "files"
CLAIM = ".committing"  # in a folder of files: it is being committed, or it was swept
SWEPT = b"swept"
Retry = Callable[..., Any]
"""Calls a function with arguments, maybe several times, and returns its result."""
DAMAGED = "the blob was damaged"  # the cause of a wrong digest: nobody changes the files of a run


def once(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function once: a `Retry` that tries nothing again."""
    return function(*arguments)


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
        self._has_one_writer = bool(below)  # a training checkpoint, which has the number of its attempt in its prefix

    @property
    def uri(self) -> str:
        """The full URI of the artifact, for messages."""
        return f"{self.store.uri}/{self.prefix}"

    def manifest(self) -> Manifest | None:
        """Return the manifest, or None if the artifact is not committed."""
        return read_manifest(self.store, self.prefix)

    def is_committed(self) -> bool:
        """Return True if the artifact has a manifest; cheaper than `manifest`."""
        return self.generation().committed

    def generation(self) -> ManifestGeneration:
        """Return the current generation of the manifest; cheaper than `manifest`."""
        return ManifestGeneration.find(self.store, self.prefix)

    def has_all_files(self) -> bool:
        """Return True if the artifact is committed and no file of its manifest is missing, without reading them."""
        manifest = self.manifest()
        stored = set(self.store.list(f"{self.prefix}/"))
        return manifest is not None and all(self.key(manifest, name) in stored for name in manifest.files)

    def key(self, manifest: Manifest, name: str) -> str:
        """Return the key of the file `name` of `manifest`, which is or will be committed here."""
        return self._file_key(manifest.folder, name)

    def _file_key(self, folder: str, name: str) -> str:
        return "/".join(part for part in (self.prefix, folder, name) if part)

    def read_file(self, name: str) -> bytes:
        """Return one file of the committed artifact, without comparing its digest; raises `BlobNotFound`."""
        manifest = self.manifest()
        if manifest is None:
            raise BlobNotFound(f"{self.uri} is not committed")
        return self.store.get(self.key(manifest, name))

    def new_folder(self, lease: Lease | None) -> str:
        """Return the name of a folder for the files of one publication, which no other publication uses.

        It is empty for a training checkpoint, whose prefix only one attempt writes to.
        """
        if self._has_one_writer:
            return ""
        number = lease.number if lease else AttemptNumber(0, 0)
        return f"{FILES}/{number}-{secrets.token_hex(4)}"

    def publish(self, folder: Path, manifest: Manifest, lease: Lease | None = None, retry: Retry = once) -> Manifest:
        """Upload every file of `folder`, then commit `manifest` with their digests.

        Args:
            folder: The files to upload.
            manifest: The manifest to commit; its `files` and its `folder` are replaced.
            lease: The lease of this attempt. It is checked before each file and before the manifest, so that a stale
                attempt stops early. None: nobody else makes this artifact.
            retry: Calls the upload of each file, and the commit.

        Returns:
            The committed manifest (see `commit`).

        Raises:
            StaleLease: A newer attempt has taken over.
        """
        destination = self.new_folder(lease)
        entries = self.upload(folder, destination, lease, retry)
        complete = manifest.model_copy(update={"files": entries, "folder": destination})
        committed: Manifest = retry(self.commit, complete, lease)
        return committed

    def upload(self, folder: Path, destination: str, lease: Lease | None, retry: Retry = once) -> dict[str, FileEntry]:
        """Upload every file of `folder` to the folder `destination` below the prefix, and return their digests.

        Raises:
            StaleLease: A newer attempt has taken over.
        """
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        entries = {name: file_entry(folder / name) for name in names}

        def upload(name: str) -> None:
            if lease is not None:
                lease.check()
            self.store.put_file(self._file_key(destination, name), folder / name)

        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(partial(retry, upload), names))
        return entries

    def commit(self, manifest: Manifest, lease: Lease | None = None) -> Manifest:
        """Write the manifest, which marks the artifact as complete.

        Returns:
            The committed manifest. If another attempt committed first, it is theirs and our files are deleted, because
            the same identity means the same content.

        Raises:
            StaleLease: A newer attempt has taken over.
        """
        while True:
            generation = ManifestGeneration.find(self.store, self.prefix)
            if lease is not None:  # after the generation was read: see `_delete_folders`
                lease.check()
                self._claim(manifest, lease)
            try:
                self.store.put_if_absent(f"{self.prefix}/{generation.manifest_name}", manifest.to_bytes())
            except BlobExists:
                committed = self.manifest()
                if committed is None:  # it was set aside in this moment
                    continue
            else:
                committed = manifest
            self._delete_folders(committed, manifest, lease)
            return committed

    def claim_to_sweep(self, folder: str) -> bool:
        """Return True if the attempt that writes to `folder` can never commit it, so that its files can be deleted.

        The attempt may have checked its lease long ago and still be about to commit. Whoever writes `CLAIM` first, the
        attempt or the caller, has the folder. The claim must not be deleted before the artifact is committed.
        """
        try:
            put_once(self.store, f"{self.prefix}/{folder}/{CLAIM}", SWEPT)
        except BlobExists:
            return False
        return True

    def set_aside(self, manifest: Manifest, reason: str) -> None:
        """Mark the files of a committed manifest as damaged, so that the artifact can be made again.

        Does nothing if `manifest` is not the one that counts any more. The caller has found its files damaged.
        """
        generation = ManifestGeneration.find(self.store, self.prefix)
        if generation.committed and self.manifest() == manifest:
            with contextlib.suppress(BlobExists):
                self.store.put_if_absent(f"{self.prefix}/{generation.damaged_name}", f"{reason}\n".encode())

    def check(self) -> None:
        """Read all files of the committed artifact and compare their digests, in bounded memory.

        Raises:
            CheckpointError: The artifact is not committed.
            DigestMismatch: A file is missing or differs from what was committed.
        """
        manifest = self.manifest()
        if manifest is None:
            raise CheckpointError(f"{self.uri} is not committed: run the stage that makes it")
        self.check_files(manifest)

    def check_files(self, manifest: Manifest) -> None:
        """Read every file of `manifest` from the store, in bounded memory.

        Raises:
            DigestMismatch: A file is missing or differs from what was committed.
        """
        check_digests(self.store, manifest, partial(self.key, manifest), self.uri, DAMAGED)

    def fetch(self, cache: Path | None = None) -> Path:
        """Download and verify all files and return their folder in the local cache (see `cache.cached_folder`).

        Args:
            cache: The folder of the cache; the default is `cache.cache_folder()`.

        Raises:
            CheckpointError: The artifact is not committed.
            DigestMismatch: A file is missing or differs from what was committed.
            StoreError: The disk of the cache has too little space, which says nothing about the artifact.
        """
        while True:
            manifest = self.manifest()
            if manifest is None:
                raise CheckpointError(f"{self.uri} is not committed (no {MANIFEST}): run the stage that makes it")
            try:
                return cached_folder(self.uri, manifest, partial(self._download, manifest), cache)
            except DigestMismatch:
                if self.manifest() == manifest:
                    raise  # otherwise it was made again in the meantime

    def _download(self, manifest: Manifest, name: str, path: Path) -> None:
        """Download one file and verify it; a file that differs is downloaded once more before it counts as damaged."""
        for _ in range(2):
            try:
                self.store.get_file(self.key(manifest, name), path)
            except BlobNotFound:
                raise missing(self.uri, name, manifest) from None
            if file_entry(path) == manifest.files[name]:
                return
        raise mismatch(self.uri, name, manifest, DAMAGED)

    def _claim(self, manifest: Manifest, lease: Lease) -> None:
        """Claim the folder of `manifest` for its commit; raise `StaleLease` if it was swept."""
        if manifest.folder:
            try:
                put_once(self.store, f"{self.prefix}/{manifest.folder}/{CLAIM}", b"")
            except BlobExists:
                raise StaleLease(
                    f"attempt {lease.number} at {self.prefix} is stale, and its files were swept"
                ) from None

    def _delete_folders(self, committed: Manifest, ours: Manifest, lease: Lease | None) -> None:
        """Delete our files if another attempt won; otherwise those of older attempts and of our own earlier tries.

        Files of newer attempts are left to them. An older attempt whose files are deleted here cannot commit them: this
        generation is committed, and once there is a next one, the attempt finds that its lease is stale.
        """
        if not ours.folder:
            return

        def is_garbage(folder: str) -> bool:
            if committed.folder != ours.folder:
                return folder == ours.folder
            return lease is not None and folder != ours.folder and folder_number(folder) <= lease.number

        with contextlib.suppress(StoreError):  # what stays is removed by `bam sweep`
            delete_keys(
                self.store,
                (
                    key
                    for key in self.store.list(f"{self.prefix}/{FILES}/")
                    if is_garbage("/".join(key.removeprefix(f"{self.prefix}/").split("/")[:2]))
                ),
            )


def folder_number(folder: str) -> AttemptNumber:
    """Return the number of the attempt that writes to `folder`, as `Artifact.new_folder` names it."""
    return AttemptNumber.parse(folder.removeprefix(f"{FILES}/"))


def delete_keys(store: BlobStore, keys: Iterable[str]) -> None:
    """Delete several keys at once, manifests before all others: what is half deleted is then not committed."""
    listed = list(keys)
    with ThreadPoolExecutor(max_workers=8) as pool:
        for manifests in (True, False):
            list(pool.map(store.delete, [key for key in listed if is_manifest(key) is manifests]))
