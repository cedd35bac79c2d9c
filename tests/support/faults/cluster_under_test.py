"""A Ray cluster and an S3 server that tests can damage.

    with ClusterUnderTest(folder) as cluster:
        driver = cluster.submit(recipe)
        cluster.nodes["one"].kill_raylet()

The cluster has a head and worker nodes, each with its own session of processes and its own folders, and SeaweedFS
behind a proxy that can fail. Ray's health checks are set to notice a lost node within seconds. Only tests can do so, as
such short periods cause false alarms.
"""

import contextlib
import os
import random
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from bam_ray.blobs import BlobStore, open_store
from bam_ray.settings import Recipe
from cluster.processes import Process, free_ports, stop
from cluster.s3_server import S3Settings, start_s3_server, stop_s3_server
from tests.support.faults.drivers import DriverProcess, SubmittedJob
from tests.support.faults.flaky_proxy import FlakyProxy
from tests.support.faults.nodes import ClusterNode

ROOT = Path(__file__).resolve().parents[3]
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",  # drivers and nodes end when the head is away for longer
}


class ClusterUnderTest:
    """The nodes, the S3 server and the drivers; all of them end with the context."""

    def __init__(self, home: Path, workers: tuple[str, ...] = ("one", "two", "three")) -> None:
        self.home = home
        self.network = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        self.port, self.dashboard_port = free_ports(2)
        self.nodes = {name: ClusterNode(self, name, number) for number, name in enumerate(("head", *workers), 1)}
        self.proxy = FlakyProxy()
        self.drivers: list[DriverProcess] = []
        self._s3 = Process("s3", home)
        self._settings = S3Settings.generate()
        self._stack = contextlib.ExitStack()
        self._count = 0

    def __enter__(self) -> "ClusterUnderTest":
        try:
            return self._start()
        except BaseException:
            self._stack.close()
            raise

    def _start(self) -> "ClusterUnderTest":
        # the paths of Ray's sockets must be short
        self.ray_folder = Path(
            self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="bam-f-", dir="/tmp", ignore_cleanup_errors=True)
            )
        )
        (self.ray_folder / "ray").mkdir()
        self._stack.callback(self._end)
        self.start_s3()
        # Ray has read its authentication when it was imported, so it cannot be changed here
        credentials = self._settings.environment() | {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}
        credentials.pop("AWS_ENDPOINT_URL")
        self._stack.enter_context(mock.patch.dict(os.environ, credentials))
        self.restore()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _end(self) -> None:
        for driver in self.drivers:
            driver.process.kill()
            driver.process.wait()
        for node in self.nodes.values():
            node.resume()
        stop([node.process for node in self.nodes.values()], timeout=0.0)
        stop_s3_server(self._s3, self._settings)
        self.proxy.close()

    def environment(self) -> dict[str, str]:
        """Return the environment of every process of the cluster."""
        return (
            dict(os.environ)
            | HEALTH
            | {
                "PYTHONPATH": str(ROOT),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # `python` of jobs
                "RAY_TMPDIR": str(self.ray_folder),
                "OMP_NUM_THREADS": "1",
                "RAY_worker_niceness": "0",  # on two cores workers with a lower priority would starve
            }
        )

    @property
    def address(self) -> str:
        """The address of the head."""
        return f"{self.network}.1:{self.port}"

    @property
    def dashboard(self) -> str:
        """The URL of the head's dashboard, which accepts jobs."""
        return f"http://{self.network}.1:{self.dashboard_port}"

    def gcs(self) -> Any:
        """Return a client of the head's control store."""
        return ray._raylet.GcsClient(address=self.address)  # the client of `ray drain-node`; Ray has no public one

    def living(self) -> Mapping[str, str]:
        """Return the names of the living nodes by id, or an empty mapping if the head does not answer."""
        with contextlib.suppress(Exception), socket.create_connection((f"{self.network}.1", self.port), timeout=1):
            return {
                node_id.hex(): info.node_name
                for node_id, info in self.gcs().get_all_node_info(timeout=5).items()
                if info.state == GcsNodeInfo.ALIVE
            }
        return {}

    def restore(self) -> None:
        """Restart everything that a fault has ended and wait until it is available."""
        self.proxy.recover()
        if self._s3.pid() is None:
            self.start_s3()
        if not self.nodes["head"].is_alive:
            for node in self.nodes.values():
                node.kill()
            self.nodes["head"].start()
            self.nodes["head"].wait(set())
        known = set(self.living())
        dead = [node for node in self.nodes.values() if not node.is_alive]
        for node in dead:
            node.start()
        for node in dead:
            node.wait(known)

    def store(self, name: str) -> BlobStore:
        """Return the store `name` in the S3 server, accessed without the proxy."""
        return open_store(self.uri(name), self._settings.endpoint)

    def uri(self, name: str) -> str:
        """Return the URI of the store `name` for recipes."""
        return f"s3://bam/{name}"

    def start_s3(self) -> None:
        """Start the S3 server, or restart it with its data."""
        self._settings = start_s3_server(self._s3, self.home / "s3", self._settings)
        self.proxy.port = self._settings.ports[0]

    def kill_s3(self) -> None:
        """Send SIGKILL to the S3 server."""
        stop([self._s3], timeout=0.0)

    def submit(self, recipe: Recipe, step_seconds: float = 0.03, kind: str = "branches") -> DriverProcess:
        """Start a driver of `recipe` for artifacts of `kind`; training steps take at least `step_seconds`."""
        self.drivers.append(DriverProcess(self, recipe, step_seconds, kind))
        return self.drivers[-1]

    def submit_job(self, recipe: Recipe) -> SubmittedJob:
        """Submit `recipe` as a Ray job."""
        return SubmittedJob(self, recipe)

    def count(self) -> int:
        """Return the next number, for the names of files."""
        self._count += 1
        return self._count
