"""Durability after SIGKILL: acknowledged blobs survive, and unfinished blobs never become visible."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from bam_ray.blobs import BlobStore, open_store, s3_uploads
from bam_ray.blobs.s3 import S3Store
from bam_ray.errors import StoreUnavailable
from bam_ray.units import MIB
from cluster.ceph_server import CephServer, missing_binaries
from cluster.processes import Process
from cluster.s3_server import BUCKET, S3Settings, start_s3_server, stop_s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WRITERS = 4
PUTS = 120  # the minimum number of acknowledged puts before each kill
ENDLESS_STREAM = """
import itertools, sys
from bam_ray.blobs import open_store

def chunks():
    for number in itertools.count():
        if number == 40:
            print("started", flush=True)
        yield bytes(1 << 20)

open_store(sys.argv[1]).put_stream("never/complete", chunks())
"""
MANY_PUTS = """
import itertools, sys
from bam_ray.blobs import open_store

store = open_store(sys.argv[1])
for number in itertools.count():
    store.put(f"many/{number}", str(number).encode() * 50_000)
    print(number, flush=True)
"""


class Server(Protocol):
    """A server that can be killed and started again with the same data."""

    processes: list[Process]

    def start(self) -> str: ...
    def stop(self) -> None: ...


class SeaweedFS:
    def __init__(self, home: Path, credentials: Callable[[str, str], None]) -> None:
        self.processes = [Process("s3", home)]
        self._home = home
        self._settings = S3Settings.generate()
        credentials(self._settings.access_key, self._settings.secret_key)

    def start(self) -> str:
        self._settings = start_s3_server(self.processes[0], self._home / "data", self._settings)
        return self._settings.endpoint

    def stop(self) -> None:
        stop_s3_server(self.processes[0], self._settings)


class Ceph:
    def __init__(self, home: Path, credentials: Callable[[str, str], None]) -> None:
        self._server = CephServer(home)
        self._credentials = credentials
        self.processes = self._server.processes

    def start(self) -> str:
        settings = self._server.start()
        self._credentials(settings.access_key, settings.secret_key)
        return settings.endpoint

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(params=[SeaweedFS, Ceph])
def server(request: pytest.FixtureRequest, tmp_path: Path, credentials: Callable[[str, str], None]) -> Iterator[Server]:
    if request.param is Ceph and missing_binaries():
        pytest.skip(f"Ceph is not installed ({missing_binaries()[0]} not found): `make ceph` installs it")
    server: Server = request.param(tmp_path, credentials)
    yield server
    server.stop()


def test_acknowledged_blobs_survive_sigkill(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_uploads, "PART_BYTES", 5 * MIB)
    digests: dict[str, str] = {}
    for cycle in range(2):
        store = S3Store(BUCKET, "durable", server.start())
        assert_all_readable(store, digests)
        killed = threading.Event()

        def write(writer: int, store: S3Store = store, cycle: int = cycle, killed: threading.Event = killed) -> int:
            """Write blobs until the server is killed, one in 30 in parts; return the number of acknowledged blobs."""
            number = 0
            while True:
                data = os.urandom((7 * MIB) if number % 30 == 29 else 1 + (number * 7919) % 100_000)
                key = f"{cycle}/{writer}/{number}"
                try:
                    store.put_stream(key, iter([data]))
                except StoreUnavailable:
                    assert killed.is_set()
                    return number
                digests[key] = hashlib.sha256(data).hexdigest()
                number += 1

        with ThreadPoolExecutor(WRITERS) as pool:
            writing = [pool.submit(write, writer) for writer in range(WRITERS)]
            before = len(digests)
            while len(digests) < before + PUTS and not any(future.done() for future in writing):
                time.sleep(0.01)
            killed.set()
            for pid in [pid for process in server.processes for pid in process.family()]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert sum(future.result() for future in writing) >= PUTS
    assert_all_readable(S3Store(BUCKET, "durable", server.start()), digests)


# A server that was just restarted accepts requests before it has found all its files
retry_unavailable = Retrying(
    retry=retry_if_exception_type(StoreUnavailable), wait=wait_fixed(0.5), stop=stop_after_delay(60)
)


def assert_all_readable(store: BlobStore, digests: dict[str, str]) -> None:
    """Check that every acknowledged blob is unchanged and that every listed blob can be read."""
    listed = list(store.list())
    assert set(digests) <= set(listed)

    def read(key: str) -> str:
        return hashlib.sha256(retry_unavailable(store.get, key)).hexdigest()

    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(listed, pool.map(read, listed), strict=True))
    assert {key: found[key] for key in digests} == digests


@pytest.fixture(params=["folder", "seaweedfs"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URI of a store that another process can open."""
    if request.param == "folder":
        return str(tmp_path / "store")
    settings: S3Settings = request.getfixturevalue("s3_server")
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/killed-writer-{os.getpid()}"


def killed_writer(script: str, uri: str, lines: int) -> list[str]:
    """Kill a writer after it printed `lines` lines and return everything that it printed."""
    command = [sys.executable, "-c", script, uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        printed = [writer.stdout.readline().strip() for _ in range(lines)]
        writer.kill()
        return printed + writer.stdout.read().split()


def test_a_killed_writer_leaves_no_partial_blobs(uri: str) -> None:
    assert killed_writer(ENDLESS_STREAM, uri, 1)[0] == "started"
    acknowledged = killed_writer(MANY_PUTS, uri, 60)
    store = open_store(uri)
    blobs = {key: store.get(key) for key in store.list()}
    assert {f"many/{number}" for number in acknowledged} <= set(blobs)
    assert blobs == {key: key.removeprefix("many/").encode() * 50_000 for key in blobs}
