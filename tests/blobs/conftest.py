"""Stores for the tests: a folder, memory, a simulated S3 server and two real ones."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from bam_ray.blobs import BlobStore
from bam_ray.blobs.folder import FolderStore
from bam_ray.blobs.memory import MemoryStore
from bam_ray.blobs.s3 import S3Store
from cluster.s3_server import BUCKET

NUMBERS = itertools.count()
CLIENTS: dict[str, Any] = {}


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """An S3 server in a thread: quick, but it takes any credentials."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="any", aws_secret_access_key="any", region_name="us-east-1"
    ).create_bucket(Bucket=BUCKET)
    yield endpoint
    server.stop()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Set the credentials that S3 stores find."""

    def use(access_key: str, secret_key: str) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)

    return use


SERVERS = {"seaweedfs": "s3_server", "ceph": "ceph_server"}
REAL_SERVERS = [pytest.param(name, marks=pytest.mark.slow) for name in SERVERS]


@pytest.fixture(params=["folder", "memory", "moto", *REAL_SERVERS])
def store(request: pytest.FixtureRequest, tmp_path: Path, credentials: Callable[[str, str], None]) -> BlobStore:
    """An empty store of each backend."""
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
    store = S3Store(BUCKET, f"run-{next(NUMBERS)}", endpoint)
    # Creating a client takes longer than most tests, so all stores of an endpoint share one
    store._lazy_client = CLIENTS.get(endpoint) or CLIENTS.setdefault(endpoint, store._client)
    return store
