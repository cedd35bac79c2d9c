"""A one-node Ceph cluster with its S3 gateway (RGW) on 127.0.0.1, a second S3 server for the tests of the blob store.

    server = CephServer(folder)
    settings = server.start()       # takes 20 s the first time and a few seconds later; all files are in the folder
    server.stop()

It consists of one monitor, one OSD (BlueStore on a sparse file) and one gateway. It has no manager, because the tests
do not need one. The binaries come from Debian's packages radosgw, ceph-mon and ceph-osd (`make ceph`). The data
survives kill -9 of all three processes.
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
CAPABILITIES = {  # entity -> its capabilities
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
BLOCK_BYTES = 8 << 30  # size of the sparse file that holds the data


@dataclass(frozen=True)
class CephSettings:
    """The endpoint and the credentials of the gateway."""

    access_key: str
    secret_key: str
    endpoint: str


def missing_binaries() -> list[str]:
    """Return the names of the Ceph binaries that are not installed."""
    return [name for name in BINARIES if shutil.which(name) is None]


class CephServer:
    """A server whose configuration, data, keys and logs are in `home`."""

    def __init__(self, home: Path) -> None:
        self._home = home.absolute()
        self._credentials = self._home / "ceph.json"
        self._monitor, self._osd, self._gateway = (Process(name, self._home) for name in ("mon", "osd", "rgw"))

    @property
    def processes(self) -> list[Process]:
        """The processes, in the order in which they must be stopped."""
        return [self._gateway, self._osd, self._monitor]

    def start(self) -> CephSettings:
        """Start all processes and wait until the gateway serves the bucket.

        Raises `ClusterError` if they do not start.
        """
        missing = missing_binaries()
        if missing:
            raise ClusterError(f"Ceph is not installed ({', '.join(missing)} not found): run `make ceph` as root")
        new = not self._credentials.exists()
        try:
            if new:
                self._initialize()
            self._run(self._monitor, "ceph-mon", "-i", "a")
            if new:
                osd = str(uuid.uuid4())
                self._command("ceph", "osd", "new", osd)
                self._command("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
            self._run(self._osd, "ceph-osd", "-i", "0")
            self._run(self._gateway, "radosgw", "-n", GATEWAY)
            return self._serve_bucket(self._create_user() if new else self._settings())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all processes. The data stays."""
        stop(self.processes)

    def _initialize(self) -> None:
        """Create keys, configuration and an empty monitor. Replaces the remains of an interrupted attempt."""
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
            options = [word for kind, allowed in capabilities.items() for word in ("--cap", kind, allowed)]
            self._command("ceph-authtool", str(keyring), "--gen-key", "-n", name, *options, configured=False)
        arguments = ["--create", "--clobber", "--fsid", fsid, "--addv", "a", addresses]
        self._command("monmaptool", *arguments, str(monmap), configured=False)
        self._command("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(monmap), "--keyring", str(keyring))

    def _create_user(self) -> CephSettings:
        """Create the S3 user. The gateway generates the keys, so they never appear on a command line."""
        output = self._command("radosgw-admin", "-n", GATEWAY, "user", "create", "--uid=bam", "--display-name=bam")
        keys = json.loads(output)["keys"][0]
        write_private(
            self._credentials, json.dumps({"access_key": keys["access_key"], "secret_key": keys["secret_key"]})
        )
        return self._settings()

    def _settings(self) -> CephSettings:
        port = (self._home / "ceph.conf").read_text().strip().rpartition(":")[2]
        return CephSettings(**json.loads(self._credentials.read_text()), endpoint=f"http://127.0.0.1:{port}")

    def _serve_bucket(self, settings: CephSettings) -> CephSettings:
        client = s3_client(settings.endpoint, settings.access_key, settings.secret_key)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for process in self.processes:
                if process.pid() is None:
                    raise ClusterError(f"Ceph's {process.name} died: {process.failure_reason()}: see {process.log}")
            with contextlib.suppress(BotoCoreError, ClientError):
                client.create_bucket(Bucket=BUCKET)  # does nothing if the bucket exists
                return settings
            time.sleep(0.2)
        raise ClusterError(f"Ceph's gateway did not start within {START_SECONDS:.0f} s: see {self._gateway.log}")

    def _run(self, process: Process, program: str, *arguments: str) -> None:
        command = [program, "-c", str(self._home / "ceph.conf"), "-f", *arguments]
        process.start(command, _environment(), self._home)

    def _command(self, program: str, *arguments: str, configured: bool = True) -> str:
        """Run a Ceph command and return its output. Raises `ClusterError` if it fails."""
        command = [program, *(("-c", str(self._home / "ceph.conf")) if configured else ()), *arguments]
        try:
            result = subprocess.run(
                command, env=_environment(), capture_output=True, text=True, timeout=START_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"{program} did not finish within {START_SECONDS:.0f} s: see {self._monitor.log}"
            ) from None
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["it printed no reason"])[-1]
            raise ClusterError(f"{program} failed: {last}: see {self._monitor.log}")
        return result.stdout


def _environment() -> dict[str, str]:
    """Return a minimal environment: Ceph's programs run on the system's Python, not on that of this process."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
