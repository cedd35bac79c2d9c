"""Long-running processes that are started detached, found again by pid file, and stopped without affecting others.

A pid alone is not enough to identify a process, because the kernel reuses pids. Each process therefore has a marker in
its environment, the path of its pid file, which its children inherit. A process is ours if its environment contains the
marker, or if the leader of its session was ours (Ray's workers overwrite their environment with their title). This
module reads /proc, so it supports Linux only, as do several Ray nodes on one machine.
"""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from bam_ray.errors import BamError

MARKER = "BAM_PROCESS"
FATAL = re.compile(
    r"([\w.]*(Error|Exception)\b|F\d{4} |error:)"
)  # the start of the last line of Python, Go's glog and shells


class ClusterError(BamError):
    """The local cluster cannot start or stop."""


class Process:
    """A named process with its pid file and log. An earlier command may have started it."""

    def __init__(self, name: str, home: Path) -> None:
        self.name = name
        self.log = home / "logs" / f"{name}.log"
        self._pid_file = home / "pids" / f"{name}.pid"
        self._marker = f"{MARKER}={self._pid_file}".encode()
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        """Start `command` in `folder` as the leader of a new session, so that it outlives this terminal."""
        for parent in (self.log.parent, self._pid_file.parent):
            parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                command,
                cwd=folder,
                env=environment | {MARKER: str(self._pid_file)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._pid_file.write_text(f"{self._child.pid}\n")

    def pid(self) -> int | None:
        """Return the pid of the process, or None if it does not run."""
        if self._child is not None:
            self._child.poll()  # a dead child of this process stays a zombie until it is polled
        pid = self._recorded_pid()
        return pid if pid is not None and self._marker in _environment(pid) else None

    def family(self) -> set[int]:
        """Return the pids of the process and of all its descendants that still run."""
        leader = self._recorded_pid()
        # If another process has the pid of the leader now, the session with this id is not ours
        session_is_ours = leader is not None and (self.pid() == leader or not _runs(leader))
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                pid = int(entry.name)
                if self._marker in _environment(pid) or (session_is_ours and _session(pid) == leader and _runs(pid)):
                    found.add(pid)
        return found

    def memory_mib(self) -> float:
        """Return the memory of the process and its descendants in MiB. Shared pages are divided among their users."""
        return sum(_proportional_kib(pid) for pid in self.family()) / 1024

    def failure_reason(self) -> str:
        """Return the line of the log that states why the process stopped, or else the last line."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        lines = [line for line in lines if line.strip()]
        candidates = [line for line in lines if FATAL.match(line)] or lines or ["its log is empty"]
        return " ".join(candidates[-1].split())[:300]

    def remove_pid_file(self) -> None:
        """Remove the pid file."""
        self._pid_file.unlink(missing_ok=True)

    def _recorded_pid(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int(self._pid_file.read_text())
        return None


def stop(processes: Iterable[Process], timeout: float = 15.0) -> list[str]:
    """Stop processes with SIGTERM, and kill those that still run after `timeout` seconds.

    Returns the names of the processes that were killed.
    """
    processes = list(processes)
    for process in processes:
        leader = process.pid()
        _signal({leader} if leader is not None else process.family(), signal.SIGTERM)
    deadline = time.monotonic() + timeout
    remaining = {process.name: process.family() for process in processes}
    while any(remaining.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
        remaining = {process.name: process.family() for process in processes}
    killed = [name for name, family in remaining.items() if family]
    while any(remaining.values()):  # repeatedly, because a process may fork meanwhile
        for family in remaining.values():
            _signal(family, signal.SIGKILL)
        time.sleep(0.1)
        remaining = {process.name: process.family() for process in processes}
    for process in processes:
        process.remove_pid_file()
    return killed


def free_ports(count: int) -> list[int]:
    """Return `count` free ports, each with a free port 10000 above it (SeaweedFS opens both).

    They are below the range that the kernel uses for outgoing connections, so no such connection takes them.
    """
    found: list[int] = []
    candidates = random.sample(range(20000, 22700), 2700)
    while len(found) < count:
        if not candidates:
            raise ClusterError("no free ports between 20000 and 22700: stop processes that listen there")
        port = candidates.pop()
        if port_is_free(port) and port_is_free(port + 10000):
            found.append(port)
    return found


def port_is_free(port: int) -> bool:
    """Return True if nothing listens on `port` on any address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # the process has ended or belongs to another user
        return []


def _session(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return None


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def _proportional_kib(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0
