"""The size of a run in the blob store, from its manifests: each lists the size of every file of its artifact."""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import cast, get_args

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import MANIFEST, Kind, Manifest
from bam_ray.errors import BlobNotFound


def stored_bytes(store: BlobStore) -> Mapping[Kind, int]:
    """Return the bytes in artifacts and training checkpoints by kind, without unfinished uploads."""
    keys = [key for kind in get_args(Kind) for key in store.list(f"{kind}/") if key.endswith(f"/{MANIFEST}")]
    sizes: Counter[str] = Counter()
    with ThreadPoolExecutor(max_workers=16) as pool:
        for key, size in zip(keys, pool.map(lambda key: _size(store, key), keys), strict=True):
            sizes[key.split("/")[0]] += size
    return cast("Mapping[Kind, int]", dict(sizes))


def _size(store: BlobStore, key: str) -> int:
    try:
        data = store.get(key)
    except BlobNotFound:  # a checkpoint that was pruned in the meantime
        return 0
    return len(data) + sum(entry.size for entry in Manifest.from_bytes(data, key).files.values())
