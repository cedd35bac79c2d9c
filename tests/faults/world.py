"""A Ray cluster and an S3 server of one's own, and what can befall them.

    with World(folder) as world:
        run = world.submit(recipe)
        world.nodes["one"].kill_raylet()

A head and worker nodes, each a session of processes with folders of its own; SeaweedFS behind a proxy that can
misbehave. Health checks are quick, so a lost node is noticed within seconds: only tests can afford the false alarms.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from faults.flaky_proxy import FlakyProxy
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.job_submission import JobDetails

from bam_ray.blobs import BlobStore, open_store
from bam_ray.on_ray.submit import client, submit
from bam_ray.settings import Recipe
from cluster.processes import Process, free_ports, stop
from cluster.s3_server import S3Settings, start_s3_server, stop_s3_server

ROOT = Path(__file__).parents[2]
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",  # after which drivers and nodes give up a head
}
START_TRIES = 3
PATIENCE = 180.0  # seconds for anything to happen; a busy machine needs a part of it


def wait_for(what: str, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait until `condition` gives something; returns it."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"in vain: {what}"
        time.sleep(0.1)
    return found


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """A signal to all that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Node:
    """One node of Ray: its processes, and a folder for what they write."""

    def __init__(self, world: "World", name: str, number: int) -> None:
        self.name = name
        self.temporary = world.home / "tmp" / name  # of its workers
        self._world = world
        self._number = number
        self._process = Process(name, world.home)
        self.id = ""

    def start(self) -> None:
        """Start it, or start it again; `wait` says when it is there."""
        world = self._world
        stop([self._process], timeout=0.0)
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.id = ""
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={world.network}.{self._number}", f"--node-name={self.name}"]
        if self.name == "head":
            command += ["--head", f"--port={world.port}", f"--dashboard-port={world.dashboard_port}", "--num-cpus=0"]
            command += [f"--dashboard-host={world.network}.1"]
        else:
            command += [f"--address={world.address}", "--num-cpus=1"]
        command += ["--object-store-memory=80000000", f"--temp-dir={world.ray_folder / self.name}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0", "--num-gpus=0"]
        own = {"TMPDIR": str(self.temporary), "BAM_CACHE": str(world.home / "cache" / self.name)}
        self._process.start(command, world.environment() | own, world.home)

    def wait(self, not_these: set[str]) -> None:
        """Until it is alive under an id that is none of these."""

        tries = START_TRIES

        def alive() -> str | None:
            nonlocal tries
            if self._process.pid() is None:  # on a busy machine it may miss the 30 s that Ray gives it to start
                tries -= 1
                assert tries, f"{self.name}: {self._process.failure_reason()}"
                self.start()
            living = self._world.living()
            return next((id for id, name in living.items() if name == self.name and id not in not_these), None)

        self.id = wait_for(f"node {self.name} is up", alive)

    @property
    def whole(self) -> bool:
        """Whether all of it runs and the head counts on it."""
        return self._process.pid() is not None and self.id in self._world.living()

    def kill_raylet(self) -> None:
        """kill -9 of the process that is the node to Ray."""
        send(signal.SIGKILL, self._raylet())

    def terminate_raylet(self) -> None:
        """SIGTERM to it."""
        send(signal.SIGTERM, self._raylet())

    def kill(self) -> None:
        """The machine is gone."""
        stop([self._process], timeout=0.0)

    def stop(self) -> None:
        """An orderly end."""
        stop([self._process], timeout=5.0)

    def drain(self, seconds: int) -> None:
        """Say that it will be taken away in so many seconds; that is then the caller's to do."""
        accepted, why = self._world.gcs().drain_node(
            self.id, DRAIN_NODE_REASON_PREEMPTION, "spot", (time.time_ns() // 1_000_000) + seconds * 1000
        )
        assert accepted, why

    def listen_for_notice(self, metadata: str) -> subprocess.Popen[bytes]:
        """Start what tells Ray when the machine's metadata server says that it will be taken away."""
        command = [sys.executable, "-m", "bam_ray.on_ray.spot", "aws", self._world.address]
        command += [f"--node-ip={self._world.network}.{self._number}", f"--metadata={metadata}"]
        return subprocess.Popen(command, env=self._world.environment())

    def break_weights(self) -> Path:
        """Make the next loss of the branch that trains there NaN, once (`faults.pace`); returns what asks for it."""
        mark = self.temporary / "nan"
        mark.touch()
        return mark

    def freeze(self) -> list[int]:
        """Stop all of its processes where they stand, as if it were cut off; returns their pids."""
        family = sorted(self._process.family())
        send(signal.SIGSTOP, family)
        return family

    def thaw(self) -> None:
        """Let them go on."""
        send(signal.SIGCONT, self._process.family())

    def _raylet(self) -> list[int]:
        return [pid for pid in self._process.family() if _command(pid).endswith("/raylet")]


class Run:
    """A driver: what a job runs, at a given pace."""

    def __init__(self, world: "World", recipe: Recipe, pace: float) -> None:
        number = world.count()
        path = world.home / f"recipe-{number}.yaml"
        path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        self.log = world.home / f"driver-{number}.log"
        command = [sys.executable, "-m", "faults.pace", str(path), "branches", str(pace)]
        environment = world.environment() | {"RAY_ADDRESS": world.address}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=world.home, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def goes_on(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM: a clean stop; returns its exit code."""
        self.process.terminate()
        return self.join()

    def join(self) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout=2 * PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said[-3000:]) from None

    @property
    def said(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")


class Job:
    """The same by way of `ray job submit`, as a user's shell does it: the script of `jobs/`, at its own pace."""

    def __init__(self, world: "World", recipe: Recipe) -> None:
        folder = world.home / f"job-{world.count()}"
        shutil.copytree(ROOT / "jobs", folder / "jobs")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        with contextlib.chdir(folder):
            self._id = submit("recipe.yaml", [], "jobs/branch.py", world.dashboard)
        self._jobs = client(world.dashboard)

    @property
    def goes_on(self) -> bool:
        """Whether it has not ended."""
        return not self._details.status.is_terminal()

    def kill(self) -> None:
        """kill -9 of the driver, by what the cluster says of the job."""
        driver = wait_for("the job has a driver", lambda: self._details.driver_info)
        os.kill(int(driver.pid), signal.SIGKILL)
        assert self.join() != 0

    def join(self) -> int:
        """Its exit code."""
        wait_for(f"job {self._id} ends", lambda: not self.goes_on, 2 * PATIENCE)
        code: int = self._details.driver_exit_code
        return code

    @property
    def said(self) -> str:
        """What it printed."""
        said: str = self._jobs.get_job_logs(self._id)
        return said

    @property
    def _details(self) -> JobDetails:
        return self._jobs.get_job_info(self._id)


class World:
    """The cluster, the store and their drivers; all of it ends with the context."""

    def __init__(self, home: Path, workers: tuple[str, ...] = ("one", "two", "three")) -> None:
        self.home = home
        self.network = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        self.port, self.dashboard_port = free_ports(2)
        self.nodes = {name: Node(self, name, number) for number, name in enumerate(("head", *workers), 1)}
        self.proxy = FlakyProxy()
        self.runs: list[Run] = []
        self._s3 = Process("s3", home)
        self._settings = S3Settings.generate()
        self._stack = contextlib.ExitStack()
        self._count = 0

    def __enter__(self) -> "World":
        try:
            return self._start()
        except BaseException:
            self._stack.close()
            raise

    def _start(self) -> "World":
        # Ray's sockets need a short path
        self.ray_folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bam-f-", dir="/tmp")))
        (self.ray_folder / "ray").mkdir()
        self._stack.callback(self._end)
        self.start_s3()
        credentials = self._settings.environment() | {"RAY_AUTH_MODE": "disabled"}
        credentials.pop("AWS_ENDPOINT_URL")
        self._stack.enter_context(mock.patch.dict(os.environ, credentials))
        self.mend()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _end(self) -> None:
        for run in self.runs:
            run.process.kill()
            run.process.wait()
        for node in self.nodes.values():
            node.thaw()
        stop([node._process for node in self.nodes.values()], timeout=0.0)
        stop_s3_server(self._s3, self._settings)
        self.proxy.close()

    def environment(self) -> dict[str, str]:
        """Of every process of the world."""
        return (
            dict(os.environ)
            | HEALTH
            | {
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # `python` of jobs
                "RAY_TMPDIR": str(self.ray_folder),
                "OMP_NUM_THREADS": "1",
                "RAY_worker_niceness": "0",  # on two cores workers would starve behind what serves them
            }
        )

    @property
    def address(self) -> str:
        """Of the head."""
        return f"{self.network}.1:{self.port}"

    @property
    def dashboard(self) -> str:
        """Of the head, which takes jobs."""
        return f"http://{self.network}.1:{self.dashboard_port}"

    def gcs(self) -> Any:
        """A word with the head."""
        return GcsClient(address=self.address)

    def living(self) -> Mapping[str, str]:
        """Names of the nodes that the head calls alive, by id; none where it does not answer."""
        with contextlib.suppress(Exception), socket.create_connection(self.address.split(":"), timeout=1):
            return {
                node_id.hex(): info.node_name
                for node_id, info in self.gcs().get_all_node_info(timeout=5).items()
                if info.state == GcsNodeInfo.ALIVE
            }
        return {}

    def mend(self) -> None:
        """Start what a fault has left dead, and wait until all is there."""
        self.proxy.heal()
        if self._s3.pid() is None:
            self.start_s3()
        if not self.nodes["head"].whole:
            for node in self.nodes.values():
                node.kill()
            self.nodes["head"].start()
            self.nodes["head"].wait(set())
        known = set(self.living())
        broken = [node for node in self.nodes.values() if not node.whole]
        for node in broken:
            node.start()
        for node in broken:
            node.wait(known)

    def store(self, name: str) -> BlobStore:
        """A place of its own in the S3 server, reached past the proxy."""
        return open_store(self.uri(name), self._settings.endpoint)

    def uri(self, name: str) -> str:
        """What a recipe calls it."""
        return f"s3://bam/{name}"

    def start_s3(self) -> None:
        """Start the S3 server, or start it again over its data."""
        self._settings = start_s3_server(self._s3, self.home / "s3", self._settings)
        self.proxy.port = self._settings.ports[0]

    def kill_s3(self) -> None:
        """kill -9."""
        stop([self._s3], timeout=0.0)

    def submit(self, recipe: Recipe, pace: float = 0.03) -> Run:
        """Start a driver of `recipe`."""
        self.runs.append(Run(self, recipe, pace))
        return self.runs[-1]

    def submit_job(self, recipe: Recipe) -> Job:
        """Submit `recipe` as a Ray job."""
        return Job(self, recipe)

    def count(self) -> int:
        self._count += 1
        return self._count


def _command(pid: int) -> str:
    """The path of the program that a process runs."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    return ""
