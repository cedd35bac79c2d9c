"""The size of a run in the blob store, from its manifests: each lists the size of every file of its artifact."""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest, is_manifest
from bam_ray.errors import BlobNotFound


def stored_bytes(store: BlobStore) -> Mapping[ArtifactKind, int]:
    """Return the bytes in artifacts and training checkpoints by kind, without unfinished uploads."""
    keys = [key for kind in ArtifactKind for key in store.list(f"{kind}/") if is_manifest(key)]
    sizes: Counter[ArtifactKind] = Counter()
    with ThreadPoolExecutor(max_workers=16) as pool:
        for key, size in zip(keys, pool.map(lambda key: _size(store, key), keys), strict=True):
            sizes[ArtifactKind(key.split("/")[0])] += size
    return dict(sizes)


def _size(store: BlobStore, key: str) -> int:
    try:
        data = store.get(key)
    except BlobNotFound:  # a checkpoint that was pruned in the meantime
        return 0
    return len(data) + sum(entry.size for entry in Manifest.from_bytes(data, key).files.values())
