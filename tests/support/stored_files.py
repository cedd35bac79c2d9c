"""Paths of the files of committed artifacts in a store that is a folder, for tests that damage them."""

from pathlib import Path

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact


def stored_file(store: Path, artifact_prefix: str, name: str) -> Path:
    """Return the path of the file `name`, or of the manifest, of the artifact at `<kind>/<id>`."""
    kind, _, id = artifact_prefix.partition("/")
    artifact = Artifact(FolderStore(store), kind, id)  # type: ignore[arg-type]
    manifest = artifact.manifest()
    assert manifest is not None
    return store / artifact.prefix / name if name == "manifest.json" else store / artifact.key(manifest, name)
