"""The nodes of a `ClusterUnderTest`, and the faults that can happen to them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from cluster.processes import Process, stop

if TYPE_CHECKING:
    from tests.support.faults.cluster_under_test import ClusterUnderTest

START_TRIES = 3
TIMEOUT = 180.0  # seconds that anything may take; even a busy machine needs only a part of it


def wait_for(what: str, condition: Callable[[], Any], seconds: float = TIMEOUT) -> Any:
    """Wait until `condition` returns a true value and return that value; `what` describes it in the error."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"timed out after {seconds:.0f} s: {what}"
        time.sleep(0.1)
    return found


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Send a signal to the processes that still exist."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class ClusterNode:
    """One Ray node: its processes and a folder for their files."""

    def __init__(self, cluster: "ClusterUnderTest", name: str, number: int) -> None:
        self.name = name
        self.temporary = cluster.home / "tmp" / name  # the folder for temporary files of its workers
        self._cluster = cluster
        self._number = number
        self.process = Process(name, cluster.home)
        self.id = ""

    def start(self) -> None:
        """Start the node, or restart it; `wait` returns when it is alive."""
        cluster = self._cluster
        stop([self.process], patience=0.0)
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.id = ""
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={cluster.network}.{self._number}", f"--node-name={self.name}"]
        if self.name == "head":
            command += [
                "--head",
                f"--port={cluster.port}",
                f"--dashboard-port={cluster.dashboard_port}",
                "--num-cpus=0",
            ]
            command += [f"--dashboard-host={cluster.network}.1"]
        else:
            command += [f"--address={cluster.address}", "--num-cpus=1"]
        command += ["--object-store-memory=80000000", f"--temp-dir={cluster.ray_folder / self.name}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0", "--num-gpus=0"]
        own = {"TMPDIR": str(self.temporary), "BAM_CACHE": str(cluster.home / "cache" / self.name)}
        self.process.start(command, cluster.environment() | own, cluster.home)

    def wait(self, known_ids: set[str]) -> None:
        """Wait until the node is alive with an id that is not one of `known_ids`."""
        tries = START_TRIES

        def alive() -> str | None:
            nonlocal tries
            if self.process.pid() is None:  # on a busy machine it may not start within the 30 s that Ray allows
                tries -= 1
                assert tries, f"{self.name}: {self.process.last_words()}"
                self.start()
            living = self._cluster.living()
            return next((id for id, name in living.items() if name == self.name and id not in known_ids), None)

        self.id = wait_for(f"node {self.name} is up", alive)

    @property
    def is_alive(self) -> bool:
        """True if the node's processes run and the head lists the node as alive."""
        return self.process.pid() is not None and self.id in self._cluster.living()

    def kill_raylet(self) -> None:
        """Send SIGKILL to the raylet, the process that represents the node in Ray."""
        send(signal.SIGKILL, self._raylet_pids())

    def terminate_raylet(self) -> None:
        """Send SIGTERM to the raylet."""
        send(signal.SIGTERM, self._raylet_pids())

    def kill(self) -> None:
        """Kill all processes of the node, as if its machine were gone."""
        stop([self.process], patience=0.0)

    def stop(self) -> None:
        """Stop the processes of the node and give them time to end."""
        stop([self.process], patience=5.0)

    def drain(self, seconds: int) -> None:
        """Announce that the node will be terminated in `seconds`; the caller must then kill it."""
        accepted, reason = self._cluster.gcs().drain_node(
            self.id, DRAIN_NODE_REASON_PREEMPTION, "spot", (time.time_ns() // 1_000_000) + seconds * 1000
        )
        assert accepted, reason

    def start_spot_listener(self, metadata_url: str) -> subprocess.Popen[bytes]:
        """Start the process that drains the node when the metadata server announces its termination."""
        command = [sys.executable, "-m", "bam_ray.on_ray.spot", "aws", self._cluster.address]
        command += [f"--node-ip={self._cluster.network}.{self._number}", f"--metadata={metadata_url}"]
        return subprocess.Popen(command, env=self._cluster.environment())

    def break_weights(self) -> Path:
        """Make the next loss of the branch on this node NaN, once.

        Returns:
            The file that requests it, which `throttled_driver` deletes.
        """
        mark = self.temporary / "nan"
        mark.touch()
        return mark

    def freeze(self) -> list[int]:
        """Suspend all processes of the node, as if its network had failed; return their pids."""
        family = sorted(self.process.family())
        send(signal.SIGSTOP, family)
        return family

    def resume(self) -> None:
        """Resume the suspended processes."""
        send(signal.SIGCONT, self.process.family())

    def _raylet_pids(self) -> list[int]:
        return [pid for pid in self.process.family() if _command(pid).endswith("/raylet")]


def _command(pid: int) -> str:
    """Return the path of the program that a process runs."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    return ""
