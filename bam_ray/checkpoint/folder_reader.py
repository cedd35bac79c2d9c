"""Reading the files of a Hugging Face folder from a blob store by name, without torch."""

from itertools import islice

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import Manifest, read_manifest
from bam_ray.checkpoint.model_folder import refuse_pointer
from bam_ray.errors import BlobNotFound

MAX_LISTED = 1000  # files of a folder that are looked at to say what it is


class FolderReader:
    """The files of a Hugging Face folder in a store.

    If bam_ray has written the folder, they are the files that its manifest names.

    Args:
        store: The store that holds the folder.
        prefix: The prefix of the folder in the store.
        has_manifest: False for a folder that is still being written, which has no manifest yet.
    """

    def __init__(self, store: BlobStore, prefix: str = "", has_manifest: bool = True) -> None:
        self.store = store
        self.prefix = prefix
        self._manifest = read_manifest(store, prefix) if has_manifest else None
        self._folder = self._manifest.folder if self._manifest else ""

    @property
    def uri(self) -> str:
        """The URI of the folder, for messages."""
        return f"{self.store.uri}/{self.prefix}".rstrip("/")

    def read_file(self, name: str) -> bytes | None:
        """Return another file of the folder, for example a tokenizer's, or None if it does not exist.

        Raises:
            CheckpointError: The file is a pointer of Git LFS.
        """
        try:
            data = self.store.get(self._key(name))
        except BlobNotFound:
            return None
        refuse_pointer(data, f"{self.uri}/{name}")
        return data

    def has_file(self, name: str) -> bool:
        """Return True if the folder has a file of this name."""
        return self.store.exists(self._key(name))

    def file_names(self, folder: str = "") -> list[str]:
        """Return the names of the first files in the folder, or in one of its subfolders."""
        root = f"{self.root}/" if self.root else ""
        keys = self.store.list(f"{root}{folder}/" if folder else root)
        return [key.removeprefix(root) for key in islice(keys, MAX_LISTED)]

    @property
    def root(self) -> str:
        """The prefix in the store of the files that the manifest names; that of the folder if there is no manifest."""
        return "/".join(part for part in (self.prefix, self._folder) if part)

    def manifest(self) -> Manifest | None:
        """Return the manifest of the folder, or None if bam_ray did not write the folder."""
        return self._manifest

    def _key(self, name: str) -> str:
        return f"{self.root}/{name}" if self.root else name
