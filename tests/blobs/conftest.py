"""Stores for the tests: a folder, memory, a simulated S3 server and two real ones."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bam_ray.blobs import BlobStore
from bam_ray.blobs.folder import FolderStore
from bam_ray.blobs.memory import MemoryStore
from bam_ray.blobs.s3 import S3Store
from cluster.s3_server import BUCKET

NUMBERS = itertools.count()
CLIENTS: dict[str, Any] = {}


SERVERS = {"seaweedfs": "s3_server", "ceph": "ceph_server"}
REAL_SERVERS = [pytest.param(name, marks=pytest.mark.slow) for name in SERVERS]


@pytest.fixture(params=["folder", "memory", "moto", *REAL_SERVERS])
def store(request: pytest.FixtureRequest, tmp_path: Path, credentials: Callable[[str, str], None]) -> BlobStore:
    """Return an empty store of each backend."""
    if request.param == "folder":
        return FolderStore(tmp_path / "store")
    if request.param == "memory":
        return MemoryStore()
    if request.param == "moto":
        credentials("any", "any")
        endpoint = request.getfixturevalue("moto_endpoint")
    else:
        server = request.getfixturevalue(SERVERS[request.param])
        credentials(server.access_key, server.secret_key)
        endpoint = server.endpoint
    # Creating a client takes longer than most tests, so all stores of an endpoint share one
    store = S3Store(BUCKET, f"run-{next(NUMBERS)}", endpoint, client=CLIENTS.get(endpoint))
    CLIENTS[endpoint] = store.client
    return store
