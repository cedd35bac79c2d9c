"""Long-running processes: started detached, found again by pid file, stopped without touching anybody else's.

A pid alone proves nothing, for it may be another's by now. So each process gets a marker in its environment, the path
of its own pid file, which everything it starts inherits. A process belongs to us where its environment carries the
marker, or where its session was opened by one that did (Ray's workers overwrite their environment with their title).
Reads /proc, hence Linux only, as Ray's several nodes on one machine are.
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
)  # how Python, Go's glog and shells begin their last line


class ClusterError(BamError):
    """The local cluster cannot start or stop: one line, what is wrong and how to mend it."""


class Process:
    """One named process with its pid file and log; it may have been started by an earlier command."""

    def __init__(self, name: str, home: Path) -> None:
        self.name = name
        self.log = home / "logs" / f"{name}.log"
        self._pid_file = home / "pids" / f"{name}.pid"
        self._marker = f"{MARKER}={self._pid_file}".encode()
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        """Start `command` in `folder` as the leader of a session of its own: it outlives this terminal."""
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
        """Its pid, or None where it does not run."""
        if self._child is not None:
            self._child.poll()  # a dead child of this very process is a zombie until it is asked for
        pid = self._recorded()
        return pid if pid is not None and self._marker in _environment(pid) else None

    def family(self) -> set[int]:
        """The pids of everything it started that still runs, itself included."""
        leader = self._recorded()
        # Where another process has the leader's number by now, a session of that number is not ours
        ours = leader is not None and (self.pid() == leader or not _runs(leader))
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                pid = int(entry.name)
                if self._marker in _environment(pid) or (ours and _session(pid) == leader and _runs(pid)):
                    found.add(pid)
        return found

    def memory_mib(self) -> float:
        """Memory of the whole family, shared pages split among their users."""
        return sum(_proportional_kib(pid) for pid in self.family()) / 1024

    def last_words(self) -> str:
        """The line of its log that says why it stopped, else the last one."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        telling = [line for line in lines if line.strip()]
        last = [line for line in telling if FATAL.match(line)] or telling or ["it said nothing"]
        return " ".join(last[-1].split())[:300]

    def forget(self) -> None:
        """Remove the pid file."""
        self._pid_file.unlink(missing_ok=True)

    def _recorded(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int(self._pid_file.read_text())
        return None


def stop(processes: Iterable[Process], patience: float = 15.0) -> list[str]:
    """Ask all to stop (SIGTERM), kill what is left after `patience` seconds; returns the names of those killed."""
    processes = list(processes)
    for process in processes:
        leader = process.pid()
        _signal({leader} if leader is not None else process.family(), signal.SIGTERM)
    until = time.monotonic() + patience
    left = {process.name: process.family() for process in processes}
    while any(left.values()) and time.monotonic() < until:
        time.sleep(0.1)
        left = {process.name: process.family() for process in processes}
    killed = [name for name, family in left.items() if family]
    while any(left.values()):  # again and again, for a child may be born meanwhile
        for family in left.values():
            _signal(family, signal.SIGKILL)
        time.sleep(0.1)
        left = {process.name: process.family() for process in processes}
    for process in processes:
        process.forget()
    return killed


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, each with the one 10000 above it free too (SeaweedFS opens both).

    They lie below the range that the kernel gives to outgoing connections, so that none of those takes them.
    """
    found: list[int] = []
    candidates = random.sample(range(20000, 22700), 2700)
    while len(found) < count:
        if not candidates:
            raise ClusterError("no free ports between 20000 and 22700: stop what listens there")
        port = candidates.pop()
        if port_is_free(port) and port_is_free(port + 10000):
            found.append(port)
    return found


def port_is_free(port: int) -> bool:
    """Whether nothing listens on `port`, on any address."""
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
    except OSError:  # gone, or another user's
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
