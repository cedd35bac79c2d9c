"""A Ceph of one node with its S3 gateway (RGW) on 127.0.0.1: an independent second server for the blob store's tests.

    server = CephServer(folder)
    settings = server.start()       # 20 s the first time, then a few; everything lies in the folder
    server.stop()

One monitor, one OSD (BlueStore on a sparse file), one gateway; no manager, for nothing here needs one. Its binaries
come from Debian's radosgw, ceph-mon and ceph-osd (`make ceph`). The data survive kill -9 of all three processes.
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError

from cluster.processes import ClusterError, Process, free_ports, stop
from cluster.s3_server import BUCKET, s3_client
from cluster.state import write_private

BINARIES = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
START_SECONDS = 120.0
GATEWAY = "client.rgw"
CAPABILITIES = {  # of each who may speak to the monitor
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
    GATEWAY: {"mon": "allow rw", "osd": "allow rwx"},
}
CONFIGURATION = """
[global]
fsid = {fsid}
mon initial members = a
mon host = {monitor}
public addr = 127.0.0.1
keyring = {home}/keyring
auth allow insecure global id reclaim = false
mon data = {home}/mon
mon data avail crit = 1
osd data = {home}/osd
rgw data = {home}/rgw
run dir = {home}
admin socket =
pid file =
log file =
log to stderr = true
err to stderr = true
debug rocksdb = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
osd objectstore = bluestore
bluestore block size = {bytes}
osd memory target = 939524096
rgw frontends = beast endpoint=127.0.0.1:{port}
"""
BLOCK_BYTES = 8 << 30  # of the sparse file that holds the data


@dataclass(frozen=True)
class CephSettings:
    """Where the gateway listens, and what it accepts."""

    access_key: str
    secret_key: str
    endpoint: str


def missing_binaries() -> list[str]:
    """What is not installed of Ceph."""
    return [name for name in BINARIES if shutil.which(name) is None]


class CephServer:
    """The server whose configuration, data, keys and logs are in `home`."""

    def __init__(self, home: Path) -> None:
        self._home = home.absolute()
        self._made = self._home / "ceph.json"
        self._monitor, self._osd, self._gateway = (Process(name, self._home) for name in ("mon", "osd", "rgw"))

    @property
    def processes(self) -> list[Process]:
        """The gateway first: the order to stop in."""
        return [self._gateway, self._osd, self._monitor]

    def start(self) -> CephSettings:
        """Start all processes and wait until the bucket is served; raises `ClusterError`."""
        missing = missing_binaries()
        if missing:
            raise ClusterError(f"Ceph is not installed ({', '.join(missing)} not found): run `make ceph` as root")
        new = not self._made.exists()
        try:
            if new:
                self._make()
            self._run(self._monitor, "ceph-mon", "-i", "a")
            if new:
                osd = str(uuid.uuid4())
                self._ask("ceph", "osd", "new", osd)
                self._ask("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
            self._run(self._osd, "ceph-osd", "-i", "0")
            self._run(self._gateway, "radosgw", "-n", GATEWAY)
            return self._serve_bucket(self._create_user() if new else self._settings())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all; the data stay."""
        stop(self.processes)

    def _make(self) -> None:
        """Keys, configuration and an empty monitor, over whatever an interrupted attempt left."""
        for name in ("mon", "osd", "rgw"):
            shutil.rmtree(self._home / name, ignore_errors=True)
            (self._home / name).mkdir(parents=True, mode=0o700)
        fsid = str(uuid.uuid4())
        new_protocol, old_protocol, port = free_ports(3)
        addresses = f"[v2:127.0.0.1:{new_protocol},v1:127.0.0.1:{old_protocol}]"
        text = CONFIGURATION.format(fsid=fsid, monitor=addresses, home=self._home, bytes=BLOCK_BYTES, port=port)
        (self._home / "ceph.conf").write_text(text)
        keyring, monmap = self._home / "keyring", self._home / "monmap"
        write_private(keyring, "")
        for name, capabilities in CAPABILITIES.items():
            granted = [word for kind, what in capabilities.items() for word in ("--cap", kind, what)]
            self._ask("ceph-authtool", str(keyring), "--gen-key", "-n", name, *granted, configured=False)
        made = ["--create", "--clobber", "--fsid", fsid, "--addv", "a", addresses]
        self._ask("monmaptool", *made, str(monmap), configured=False)
        self._ask("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(monmap), "--keyring", str(keyring))

    def _create_user(self) -> CephSettings:
        """Keys that the gateway itself draws: they are on no command line."""
        answer = self._ask("radosgw-admin", "-n", GATEWAY, "user", "create", "--uid=bam", "--display-name=bam")
        keys = json.loads(answer)["keys"][0]
        write_private(self._made, json.dumps({"access_key": keys["access_key"], "secret_key": keys["secret_key"]}))
        return self._settings()

    def _settings(self) -> CephSettings:
        port = (self._home / "ceph.conf").read_text().strip().rpartition(":")[2]
        return CephSettings(**json.loads(self._made.read_text()), endpoint=f"http://127.0.0.1:{port}")

    def _serve_bucket(self, settings: CephSettings) -> CephSettings:
        client = s3_client(settings.endpoint, settings.access_key, settings.secret_key)
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            for process in self.processes:
                if process.pid() is None:
                    raise ClusterError(f"Ceph's {process.name} died: {process.last_words()} (whole log: {process.log})")
            with contextlib.suppress(BotoCoreError, ClientError):
                client.create_bucket(Bucket=BUCKET)  # nothing happens where it is there
                return settings
            time.sleep(0.2)
        raise ClusterError(f"Ceph's gateway was not up within {START_SECONDS:.0f} s: look at {self._gateway.log}")

    def _run(self, process: Process, program: str, *arguments: str) -> None:
        command = [program, "-c", str(self._home / "ceph.conf"), "-f", *arguments]
        process.start(command, _environment(), self._home)

    def _ask(self, program: str, *arguments: str, configured: bool = True) -> str:
        """What a command of Ceph's answers."""
        command = [program, *(("-c", str(self._home / "ceph.conf")) if configured else ()), *arguments]
        try:
            result = subprocess.run(
                command, env=_environment(), capture_output=True, text=True, timeout=START_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"{program} did not answer in {START_SECONDS:.0f} s: look at {self._monitor.log}"
            ) from None
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ClusterError(f"{program} failed: {last}")
        return result.stdout


def _environment() -> dict[str, str]:
    """Ceph's programs are the system's Python's: nothing of this one's environment."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
