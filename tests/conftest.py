"""The clean environment of all tests, and the fixtures of real S3 servers."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

from cluster.ceph_server import CephServer, CephSettings, missing_binaries
from cluster.processes import Process
from cluster.s3_server import S3Settings, start_s3_server, stop_s3_server

pytest_plugins = ["tests.support.s3_servers"]

# A shell that loaded `.bam/env` must not lead tests to its cluster, its bucket or its cache
for name in list(os.environ):
    if name.startswith(("AWS_", "RAY_", "BAM_")) and name != "AWS_CA_BUNDLE":
        del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"  # Ray's default depends on what else ran on the machine
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # boto3 must not request missing credentials over the network

# No deadline, because the duration of an example depends on the load of the machine
hypothesis.settings.register_profile("bam", deadline=None, max_examples=40)
hypothesis.settings.load_profile("bam")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Settings]:
    """Start a real S3 server with random credentials and the empty bucket `bam`; tests that use it are marked slow."""
    home = tmp_path_factory.mktemp("s3-server")
    process = Process("s3", home)
    settings = start_s3_server(process, home / "data", S3Settings.generate())
    yield settings
    stop_s3_server(process, settings)


@pytest.fixture(scope="session")
def ceph_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephSettings]:
    """Start a Ceph gateway with the bucket `bam`; skip the test if Ceph is not installed."""
    missing = missing_binaries()
    if missing:
        pytest.skip(f"Ceph is not installed ({missing[0]} not found): `make ceph` installs it")
    server = CephServer(tmp_path_factory.mktemp("ceph-server"))
    yield server.start()
    server.stop()
